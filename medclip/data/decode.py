"""An image file to the model's pixels: open_clip's transforms bit for bit, or the same picture several times faster.

`exact` is open_clip's PIL path: decode in full, cut, resize with Pillow's antialiased bicubic. The fast path decodes
a JPEG at 1/2, 1/4 or 1/8 of its size where that leaves enough pixels, and resizes with torch's antialiased uint8
kernels, which differ from Pillow's by rounding alone.

What was measured before this was chosen (one core, JPEGs of 512-1024 px to 224 px, random crops of scale 0.9-1.0;
drift is the mean absolute difference from the exact path in levels of 255, on medical photographs / on generated 1/f
images of 1.8 bits a pixel / on harsh textures of 3.3 bits a pixel):

    Pillow (exact)                                   9.9 ms   0         0      0
    1/n scale, cv2 INTER_AREA, box rounded           3.4 ms   0.8-1.6   -      5.0
    1/n scale, cv2.warpAffine, no antialiasing       2.6 ms   0.4-1.1   -      4.5
    1/n scale, torch bicubic, box rounded            3.3 ms   0.9-1.6   -      4.7
    1/n scale, Pillow bicubic, fractional box        4.3 ms   0.3-0.5   0.8    1.5
    1/n scale, torch bicubic, box on the grid        3.3 ms   0.3-0.5   0.8    1.5
    the same with `reduction`'s margin (here)        3.4 ms   0.3-0.5   0.7    0.4
    full decode, torch bicubic                       5.1 ms   0         0      0

So half a pixel of the box matters more than the filter; scales such as 5/8 decode more slowly than the full size.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from medclip.data.bad import BadSample
from medclip.data.crop import Fit, RandomCrop, evaluation_fit
from medclip.data.formats import Picture, open_picture
from medclip.types import Preprocess


def read_image(
    data: bytes,
    preprocess: Preprocess,
    *,
    crop: RandomCrop | None = None,
    rng: np.random.Generator | None = None,
    exact: bool = False,
    max_pixels: int = 89_000_000,
    resize: int | None = None,
    burned_in: bool = False,
    refuse_flat: bool = False,
) -> np.ndarray:
    """Decode one image file and bring it to the model's size.

    Args:
        data: a JPEG, PNG, WebP, TIFF, GIF, BMP or DICOM file (see `data/formats.py` and `data/dicom.py` for how values
            become 8-bit RGB).
        preprocess: size, resize mode, interpolation and fill colour.
        crop: random part of the image, as in open_clip's training transform; None for its evaluation transform.
        rng: the only source of randomness; needed with `crop`.
        exact: bit-identical to open_clip's PIL path, for the same box.
        max_pixels: larger images are refused by their header.
        resize: pixels of the shorter side before the centre crop, in the evaluation transform.
        burned_in: take DICOM pictures that say they hold burned-in annotation.
        refuse_flat: refuse pictures of one colour.

    Returns:
        uint8 (height, width, 3) of `preprocess.size`.

    Raises:
        BadSample: the bytes are no readable image, or too large a one.
    """
    picture = open_picture(data, max_pixels, burned_in=burned_in)
    if crop is None:
        fit = evaluation_fit(preprocess, picture.height, picture.width, resize)
    else:
        if rng is None:
            raise ValueError("a random crop needs a generator")
        fit = crop.fit(preprocess, picture.height, picture.width, rng)
    if fit.resized[0] * fit.resized[1] > max_pixels:
        raise BadSample("over pixel limit", f"{picture.width} x {picture.height} pixels is too elongated to resize")
    # open_clip passes the interpolation on in some of its transforms and takes bicubic in the others.
    oblong = resize is None and preprocess.resize_mode == "shortest" and preprocess.size[0] != preprocess.size[1]
    bilinear = preprocess.interpolation == "bilinear" and crop is None and not oblong
    factor = 1 if exact else reduction(picture, fit, len(data))
    decoded = picture.pixels(factor)
    if refuse_flat and decoded.min() == decoded.max():
        raise BadSample("zero contrast", f"every pixel is {decoded.min()}")
    image = _resize_exact(decoded, fit, bilinear) if exact else _resize_fast(decoded, factor, fit, bilinear)
    image = _window(image, fit.offset, preprocess)
    if crop is not None and rng is not None:
        for augment in crop.then:
            image = augment(image, rng)
    return image


def reduction(picture: Picture, fit: Fit, file_bytes: int) -> int:
    """The largest of 1, 2, 4, 8 by which a picture may be decoded smaller.

    What is left must be at least the resolution asked for, more so (up to 1.6 times) where the file spends many bits on
    a pixel: fine texture would alias in the exact path, and does not when it is cut off before. The box must begin on a
    whole pixel.
    """
    if not picture.scalable:
        return 1
    bits_per_pixel = 8 * file_bytes / (picture.height * picture.width)
    margin = min(max(bits_per_pixel / 1.4, 1.0), 1.6)
    box, (height, width) = fit.box, fit.resized
    factor = 1
    while (
        factor < 8
        and min(box.height / height, box.width / width) >= 2 * factor * margin
        and (box.top | box.left) % (2 * factor) == 0
    ):
        factor *= 2
    return factor


def _resize_exact(pixels: np.ndarray, fit: Fit, bilinear: bool) -> np.ndarray:
    box, (height, width) = fit.box, fit.resized
    part = np.ascontiguousarray(pixels[box.top : box.top + box.height, box.left : box.left + box.width])
    how = Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(part).resize((width, height), how))


def _resize_fast(pixels: np.ndarray, factor: int, fit: Fit, bilinear: bool) -> np.ndarray:
    box, (height, width) = fit.box, fit.resized
    top, left = box.top // factor, box.left // factor
    part = pixels[top : top - (-box.height // factor), left : left - (-box.width // factor)]
    resize = torch.ops.aten._upsample_bilinear2d_aa if bilinear else torch.ops.aten._upsample_bicubic2d_aa
    # (h, w, 3) seen as (1, 3, h, w) is channels-last, for which torch has vectorised uint8 kernels. The scales are
    # given, since the box may end within a decoded pixel.
    planes = torch.from_numpy(np.require(part, requirements=["C", "W"])).permute(2, 0, 1)[None]
    resized = resize(planes, (height, width), False, height * factor / box.height, width * factor / box.width)
    return resized[0].permute(1, 2, 0).numpy()


def _window(image: np.ndarray, offset: tuple[int, int], preprocess: Preprocess) -> np.ndarray:
    """Look at the resized image through the model's window; fill what lies outside of it."""
    height, width = preprocess.size
    if image.shape[:2] == (height, width):
        return image
    top, left = offset
    seen = image[max(top, 0) : top + height, max(left, 0) : left + width]
    if seen.shape[:2] == (height, width):
        return seen
    window = np.full((height, width, 3), preprocess.fill_color, dtype=np.uint8)
    y, x = max(-top, 0), max(-left, 0)
    window[y : y + seen.shape[0], x : x + seen.shape[1]] = seen
    return window
