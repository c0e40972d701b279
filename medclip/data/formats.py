"""Bytes of an image file to upright 8-bit RGB, whatever the format; hostile until proven otherwise.

`open_picture` reads the header alone: format, size, orientation. Nothing is decoded before the number of pixels is
known to be within the limit. `Picture.pixels` decodes. What a value means is settled here, once:

- Unsigned integers are scaled by the range of their bit depth: 16-bit by 1/257, 12-bit TIFF by 1/16.06 (Pillow clips
  16-bit greys at 255, or drops their low byte). Detectors fill 10, 12 or 14 bits, and their greys are stored as 16: a
  16-bit grey without a value beyond 1023, 4095 or 16383 is scaled by that, or an X-ray of 12 bits would be sixteen
  nearly black tones. Signed integers and floats have no such range: floats within [0, 1] are taken as such, anything
  else is stretched from its least finite value to its greatest.
- Whatever is transparent lies on white. Palettes are looked up. CMYK is read as Pillow does, without a colour profile;
  Adobe's inverted JPEGs are turned round.
- EXIF and TIFF orientation are honoured; width and height are those of the upright image.
- Of animations and multi-page files, the first picture counts.
- A JPEG that ends early is refused, not half grey; bytes too many between its segments are forgiven.

JPEG goes through libjpeg-turbo (simplejpeg), TIFF through tifffile, 16-bit PNG through imagecodecs, the rest through
Pillow, which may try no other format than those named here. Its own ceiling of 179 million pixels holds as well. DICOM
has its own file, `data/dicom.py`.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import imagecodecs
import numpy as np
import simplejpeg
import tifffile
from PIL import Image

from medclip.data.bad import BadSample

# What a broken TIFF makes tifffile say goes into the ledger of bad samples, once, and not to every worker's stderr.
logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)

ORIENTATION_TAG = 0x0112
# libjpeg's warnings that leave every pixel in place.
_HARMLESS = ("extraneous bytes", "Adobe color transform", "JFIF revision", "Invalid SOS parameters")
_BARE_DICOM = (b"\x02\0", b"\x08\0")  # the first group of a file without preamble
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@dataclass(frozen=True)
class Picture:
    """An image whose header is read.

    Args:
        height: of the upright image, in pixels.
        width: likewise.
        scalable: whether `pixels` can decode at 1/2, 1/4 and 1/8 scale.
        pixels: decodes at 1/n scale to uint8 RGB (ceil(height / n), ceil(width / n), 3).
    """

    height: int
    width: int
    scalable: bool
    pixels: Callable[[int], np.ndarray]


@contextmanager
def broken_is_bad() -> Iterator[None]:
    """Turn whatever a decoder raises on hostile bytes into `BadSample`, and keep its warnings off stderr."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample("over pixel limit", str(error)) from None
    except Exception as error:  # decoders raise anything, from struct.error to ZeroDivisionError
        raise BadSample("broken image", " ".join(f"{type(error).__name__}: {error}".split())[:200]) from None


def open_picture(data: bytes, max_pixels: int, *, burned_in: bool = False) -> Picture:
    """Read the header of an image file.

    Args:
        data: the file.
        max_pixels: more are refused.
        burned_in: take DICOM pictures that say they hold burned-in annotation.

    Raises:
        BadSample: no image that we read, a broken one, or one that is refused.
    """
    if not data:
        raise BadSample("broken image", "no bytes")
    if data[:2] == b"\xff\xd8":
        return _open_jpeg(data, max_pixels)
    if data[128:132] == b"DICM" or data[:2] in _BARE_DICOM:
        from medclip.data.dicom import open_dicom  # here: pydicom takes a while, and few need it

        return open_dicom(data, max_pixels, burned_in=burned_in)
    with broken_is_bad():
        if data[:4] in _TIFF_MAGIC:
            return _open_tiff(data, max_pixels)
        return _open_other(data, max_pixels)


def check_size(height: int, width: int, max_pixels: int) -> None:
    """Refuse a picture by the size that its header says.

    Raises:
        BadSample: no pixels, or too many.
    """
    if height < 1 or width < 1:
        raise BadSample("broken image", f"{width} x {height} pixels")
    if height * width > max_pixels:
        raise BadSample("over pixel limit", f"{width} x {height} pixels, more than {max_pixels}")


def _open_jpeg(data: bytes, max_pixels: int) -> Picture:
    """Header and orientation of a JPEG, within microseconds for the usual one."""
    try:
        size = simplejpeg.decode_jpeg_header(data, strict=False)
        height, width, colours = int(size[0]), int(size[1]), size[2]
        turbo = colours in ("YCbCr", "Gray", "RGB")
    except (ValueError, KeyError):  # a sampling that TurboJPEG does not know, or no JPEG
        with broken_is_bad(), Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            width, height = image.size
        turbo = False
    check_size(height, width, max_pixels)

    def pixels(factor: int) -> np.ndarray:
        if turbo:
            try:
                return simplejpeg.decode_jpeg(
                    data, "RGB", min_height=-(-height // factor), min_width=-(-width // factor)
                )
            except Exception as error:
                if not any(harmless in str(error) for harmless in _HARMLESS):
                    raise BadSample("broken image", str(error)) from None
        with broken_is_bad(), Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            if factor > 1:
                image.draft(None, (width // factor, height // factor))
            return np.asarray(image.convert("RGB"))

    picture = Picture(height, width, scalable=True, pixels=pixels)
    header = data[: _scan_start(data)]
    if b"Exif" in header or b"tiff:Orientation" in header:
        with broken_is_bad(), Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            return _upright(picture, _orientation(image))
    return picture


def _scan_start(data: bytes) -> int:
    """Where a JPEG's compressed pixels begin, by its segments' lengths; the end of the file if they make no sense."""
    place = 2
    while data[place : place + 1] == b"\xff" and place + 4 <= len(data):
        kind = data[place + 1]
        if kind == 0xFF:  # padding before a marker
            place += 1
        elif kind == 0xDA:  # start of scan
            return place
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return len(data)


def _open_other(data: bytes, max_pixels: int) -> Picture:
    """PNG, WebP, GIF and BMP."""
    image = Image.open(io.BytesIO(data), formats=["PNG", "WEBP", "GIF", "BMP"])
    width, height = image.size
    check_size(height, width, max_pixels)
    # Pillow turns 16-bit colours into 8 bits and leaves 16-bit greys as they are, so the depth is read from IHDR.
    deep = image.format == "PNG" and data[24] == 16

    def pixels(_: int) -> np.ndarray:
        with broken_is_bad():
            if deep:
                array = imagecodecs.png_decode(data)
                return _to_rgb(_scaled(array, _filled_bits(array) if array.ndim == 2 else 16))
            if image.has_transparency_data:
                return _to_rgb(np.asarray(image.convert("RGBA")))
            return np.asarray(image.convert("RGB"))

    return _upright(Picture(height, width, scalable=False, pixels=pixels), _orientation(image))


def _open_tiff(data: bytes, max_pixels: int) -> Picture:
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        page = _first_page(tiff)
        height, width = page.imagelength, page.imagewidth
        check_size(height, width, max_pixels)
        if page.is_tiled:
            check_size(page.tilelength, page.tilewidth, max_pixels)
        if page.imagedepth != 1 or not 1 <= page.samplesperpixel <= 5:
            raise BadSample("unsupported image", f"TIFF of {page.samplesperpixel} channels, depth {page.imagedepth}")
        extents = zip(page.dataoffsets, page.databytecounts, strict=True)
        if any(length == 0 or offset + length > len(data) for offset, length in extents):
            raise BadSample("broken image", "TIFF ends before its pixels do")
        orientation = page.tags.valueof(ORIENTATION_TAG, default=1)

    def pixels(_: int) -> np.ndarray:
        with broken_is_bad(), tifffile.TiffFile(io.BytesIO(data)) as tiff:
            return _tiff_rgb(_first_page(tiff))

    return _upright(Picture(height, width, scalable=False, pixels=pixels), orientation)


def _first_page(tiff: tifffile.TiffFile) -> tifffile.TiffPage:
    page = tiff.pages.first
    if not isinstance(page, tifffile.TiffPage):
        raise BadSample("broken image", "TIFF without a page")
    return page


def _tiff_rgb(page: tifffile.TiffPage) -> np.ndarray:
    """Decode a TIFF page of 1 to 5 channels by what its photometric tag says they are."""
    array = page.asarray(maxworkers=1)
    channels = page.samplesperpixel
    if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
        array = np.moveaxis(array.reshape(channels, page.imagelength, page.imagewidth), 0, 2)
    else:
        array = array.reshape(page.imagelength, page.imagewidth, channels)
    photometric = tifffile.PHOTOMETRIC(page.photometric)
    if photometric == tifffile.PHOTOMETRIC.PALETTE and page.colormap is not None:
        # Writers fill 16 bits with 256 v or 257 v; the high byte is v for both.
        return (page.colormap.T >> 8).astype(np.uint8)[array[..., 0]]
    deep = array.dtype == np.uint16 and channels == 1 and page.bitspersample == 16
    array = _scaled(array, _filled_bits(array) if deep else page.bitspersample)
    if photometric == tifffile.PHOTOMETRIC.SEPARATED and channels >= 4:
        return np.asarray(Image.fromarray(np.ascontiguousarray(array[..., :4]), "CMYK").convert("RGB"))
    if photometric in (tifffile.PHOTOMETRIC.MINISWHITE, tifffile.PHOTOMETRIC.MINISBLACK):
        colours = 1
    elif photometric in (tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.YCBCR) and channels >= 3:
        colours = 3
    else:
        raise BadSample("unsupported image", f"TIFF of {channels} channels that are {photometric.name}")
    if photometric == tifffile.PHOTOMETRIC.MINISWHITE:
        array = np.concatenate([255 - array[..., :1], array[..., 1:]], axis=2)
    alpha = [k for k, kind in enumerate(page.extrasamples[: channels - colours]) if kind in (1, 2)]
    if not alpha:
        return _to_rgb(array[..., :colours])
    opacity = array[..., colours + alpha[0], None]
    if page.extrasamples[alpha[0]] == tifffile.EXTRASAMPLE.ASSOCALPHA:  # colours are multiplied by alpha already
        return _to_rgb(np.minimum(array[..., :colours].astype(np.uint16) + (255 - opacity), 255).astype(np.uint8))
    return _to_rgb(np.concatenate([array[..., :colours], opacity], axis=2))


def _scaled(array: np.ndarray, bits: int) -> np.ndarray:
    """Values to 0..255, by the rules of the module's first lines."""
    if array.dtype == np.uint8 and bits == 8:
        return array
    if array.dtype.kind in "bu":
        top = 2.0 ** (1 if array.dtype.kind == "b" else bits) - 1
        return np.rint(array * (255 / top)).astype(np.uint8)
    if array.dtype.kind not in "if":
        raise BadSample("unsupported image", f"pixels of type {array.dtype}")
    fraction = array.dtype.kind == "f"
    array = array.astype(np.float64)
    finite = np.isfinite(array)
    low, high = (array[finite].min(), array[finite].max()) if finite.any() else (0.0, 1.0)
    if fraction and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    array = np.nan_to_num(array, nan=low, posinf=high, neginf=low)
    return np.rint((array - low) * (255 / max(high - low, np.finfo(np.float64).tiny))).astype(np.uint8)


def _filled_bits(grey: np.ndarray) -> int:
    """How many of a 16-bit grey's bits its detector had: 10, 12, 14 or 16."""
    most = int(grey.max(initial=0))
    return next(bits for bits in (10, 12, 14, 16) if most < 1 << bits)


def _to_rgb(array: np.ndarray) -> np.ndarray:
    """uint8 grey, grey + alpha, RGB or RGBA to RGB on white."""
    array = array[..., None] if array.ndim == 2 else array
    colours, alpha = (array[..., :-1], array[..., -1:]) if array.shape[2] in (2, 4) else (array, None)
    if alpha is not None:
        # 255 - (255 - c) a / 255, rounded: white shows where the picture does not.
        colours = (255 - ((255 - colours.astype(np.uint32)) * alpha + 127) // 255).astype(np.uint8)
    return np.broadcast_to(colours, (*colours.shape[:2], 3))


def _orientation(image: Image.Image) -> int:
    """EXIF (or XMP) orientation 1..8; a broken EXIF block does not condemn the pixels."""
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # Pillow's EXIF and XMP readers raise anything
        return 1


# What makes the stored picture upright, by EXIF orientation.
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a[::-1].transpose(1, 0, 2),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a[:, ::-1].transpose(1, 0, 2),
}


def _upright(picture: Picture, orientation: int) -> Picture:
    turn = _TURNS.get(orientation)
    if turn is None:
        return picture
    height, width = (picture.width, picture.height) if orientation >= 5 else (picture.height, picture.width)
    # Turned round, a reduced picture's partial last pixels would come first and shift everything: decode in full.
    return replace(
        picture, height=height, width=width, scalable=False, pixels=lambda factor: turn(picture.pixels(factor))
    )
