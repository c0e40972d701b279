"""Plain images as slides of one level: PNG, JPEG, BMP, and TIFFs without tiles. Held in memory, below a limit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tifffile
from PIL import Image, UnidentifiedImageError

from slides.assemble import blank
from slides.errors import SlideError
from slides.openslides import on_white
from slides.reader import Level
from slides.tiff import DEEP, samples_on_white

MAX_PIXELS = 400_000_000  # 1.2 GB in memory
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")
_KINDS = ((0, 1), (1, 1), (2, 3), (2, 4))  # TIFF's photometric, samples a pixel
_MEND = "convert it to 8-bit RGB"


class ImageSlide:
    """An image that has been read; see `reader.Slide`."""

    def __init__(
        self,
        path: Path,
        pixels: np.ndarray,
        *,
        mpp: float,
        mpp_source: str,
        properties: Mapping[str, str],
        icc: bytes | None = None,
    ) -> None:
        self.path, self.pixels = path, pixels
        self.size = (pixels.shape[1], pixels.shape[0])
        self.levels = (Level(*self.size, 1.0),)
        self.mpp, self.mpp_source = mpp, mpp_source
        self.properties, self.icc = properties, icc

    def scalable(self, level: int) -> bool:
        return False

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        out = blank(height, width)
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + width, self.size[0]), min(y + height, self.size[1])
        if x1 > x0 and y1 > y0:
            out[y0 - y : y1 - y, x0 - x : x1 - x] = self.pixels[y0:y1, x0:x1]
        return out

    def read_tile(self, level: int, column: int, row: int, reduce: int = 1) -> np.ndarray | None:
        raise NotImplementedError("an image has no tiles")

    def tile_jpeg(self, level: int, column: int, row: int) -> bytes | None:
        return None

    def close(self) -> None:
        pass

    def __enter__(self) -> ImageSlide:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, dict[str, str], bytes | None]:
    """uint8 RGB pixels on white, properties (resolution in openslide's words), ICC profile.

    Raises:
        SlideError: not an image, a broken or 16-bit one, or one over the pixel limit.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise SlideError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        with file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            head = file.read(32)
            file.seek(0)
            if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
                return _tiff(path, file, max_pixels)
            return _other(path, file, head, max_pixels)
    except SlideError:
        raise
    except UnidentifiedImageError:
        raise SlideError(f"{path}: no slide, and no image that can be read") from None
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise SlideError(f"{path}: {_large(f'more than {most} pixels', most)}") from None
    except Exception as error:  # decoders raise anything
        raise SlideError(f"{path}: no slide or image that can be read ({' '.join(str(error).split())[:150]})") from None


def _check(path: Path, width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise SlideError(f"{path}: {_large(f'{width} x {height} pixels', max_pixels)}")


def _large(pixels: str, most: int) -> str:
    return (
        f"{pixels} without tiles is over the limit of {most}: convert it to a tiled pyramid, "
        "e.g. `vips tiffsave in.png out.tif --tile --pyramid --compression jpeg`"
    )


def _other(path: Path, file: BinaryIO, head: bytes, max_pixels: int) -> tuple[np.ndarray, dict[str, str], bytes | None]:
    with Image.open(file, formats=_FORMATS) as image:
        _check(path, *image.size, max_pixels)
        if image.mode.startswith(("I", "F")) or (image.format == "PNG" and head[24] == 16):
            raise SlideError(f"{path}: {DEEP}")
        properties = {"openslide.vendor": f"{image.format}".lower()}
        # Dots an inch stand in most images for nothing; `mpp` refuses what is no scanner's.
        if isinstance(dpi := image.info.get("dpi"), tuple) and all(dpi):
            properties |= {"tiff.ResolutionUnit": "inch", "tiff.XResolution": f"{float(dpi[0])}"}
            properties |= {"tiff.YResolution": f"{float(dpi[1])}"}
        profile = image.info.get("icc_profile")
        if image.has_transparency_data:
            return on_white(np.asarray(image.convert("RGBA"))), properties, profile
        return np.asarray(image.convert("RGB")), properties, profile


def _tiff(path: Path, file: BinaryIO, max_pixels: int) -> tuple[np.ndarray, dict[str, str], bytes | None]:
    with tifffile.TiffFile(file, name=path.name) as tiff:
        page = tiff.pages.first
        if not isinstance(page, tifffile.TiffPage):
            raise SlideError(f"{path}: a TIFF without an image")
        _check(path, page.imagewidth, page.imagelength, max_pixels)
        if page.bitspersample > 8:
            raise SlideError(f"{path}: {DEEP}")
        kind = (int(page.photometric), page.samplesperpixel)
        jpeg = page.compression in (6, 7)  # whose YCbCr tifffile converts
        if page.dtype != np.uint8 or not (kind in _KINDS or (jpeg and kind == (6, 3))):
            raise SlideError(f"{path}: a TIFF of {kind[1]} x {page.dtype}, {page.photometric!r}, is no slide: {_MEND}")
        pixels = page.asarray(maxworkers=1)
        if page.planarconfig == 2 and pixels.ndim == 3:
            pixels = np.moveaxis(pixels, 0, -1)
        if pixels.ndim not in (2, 3):
            raise SlideError(f"{path}: a TIFF of shape {pixels.shape} is no slide: {_MEND}")
        if page.photometric == 0:
            pixels = 255 - pixels
        if pixels.ndim == 2 or pixels.shape[2] == 1:
            pixels = np.repeat(pixels.reshape(*pixels.shape[:2], 1), 3, axis=2)
        if pixels.shape[2] == 4:
            alpha = int(page.extrasamples[0]) if page.extrasamples else 0
            pixels = samples_on_white(pixels, alpha, pixels.shape[:2])
        return np.ascontiguousarray(pixels[..., :3]), tiff_properties(page), page.iccprofile


def tiff_properties(page: tifffile.TiffPage) -> dict[str, str]:
    """A TIFF page's resolution in openslide's words."""
    found = {"openslide.vendor": "tiff"}
    unit = {2: "inch", 3: "centimeter"}.get(int(page.resolutionunit or 0))
    if unit is not None:
        x, y = page.resolution
        found |= {"tiff.ResolutionUnit": unit, "tiff.XResolution": f"{x}", "tiff.YResolution": f"{y}"}
    return found
