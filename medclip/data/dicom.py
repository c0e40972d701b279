"""DICOM files to 8-bit RGB, as a viewer would show them when it opens them.

The steps of the standard (PS3.3 C.7.6.3, C.11.1, C.11.2): stored values; modality LUT or rescale slope and intercept;
VOI LUT if there is one, else the first window (LINEAR, LINEAR_EXACT or SIGMOID); MONOCHROME1 inverted. Without any VOI
the values are stretched from the least to the greatest that the picture has, pixel padding left out. Colours (RGB, YBR,
palette) are scaled by their bit depth. Of several frames the middle one is taken.

Refused: pictures with burned-in annotation (`BurnedInAnnotation` YES) unless the source says `burned_in: true`, those
of one grey, those whose pixels end early, more pixels than the limit in all frames together (by the header, and by the
compressed frame's own header, before anything is decoded), whole slides (they are for the source `slides`).

Nothing that names a patient is read: the parser is given the list of elements below and passes over all others, and
what goes wrong is told by kind, never by what a file holds.
"""

from __future__ import annotations

import io
import logging
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pydicom
from pydicom import uid
from pydicom.encaps import get_frame
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi, get_decoder

from medclip.data.bad import BadSample
from medclip.data.dicom_codecs import CODESTREAMS, plugin
from medclip.data.formats import Picture, check_size

# Its warnings and errors quote what a file says.
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)

_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_ELEMENTS = [
    "SOPClassUID",
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit"),
    *("BurnedInAnnotation", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
    *("VOILUTSequence", "VOILUTFunction", "WindowCenter", "WindowWidth"),
    *(f"{c}PaletteColorLookupTable{part}" for c in ("Red", "Green", "Blue") for part in ("Data", "Descriptor")),
    *(f"Segmented{c}PaletteColorLookupTableData" for c in ("Red", "Green", "Blue")),
    *("ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
    *_PIXELS,
]
_WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
_MAX_HEADER = 64 << 20  # bytes of a deflated file beyond those of its pixels
_TABLE = 1 << 16  # values that are mapped by a table instead of one by one


def open_dicom(data: bytes, max_pixels: int, *, burned_in: bool = False) -> Picture:
    """Read the header of a DICOM file, with or without preamble.

    Args:
        data: the file.
        max_pixels: more, in all frames together, are refused.
        burned_in: take pictures that say they hold burned-in annotation.

    Raises:
        BadSample: no picture, a broken one, one that is refused (see above), or in a transfer syntax without a decoder.
    """
    with _told_by_kind():
        header = _read(data, max_pixels)
        if not any(name in header for name in _PIXELS):
            if "Rows" in header or not len(header):  # the parser drops what the file ends in, or everything
                raise BadSample("broken image", "DICOM ends before its pixels do")
            raise BadSample("unsupported image", "DICOM without pixels (a report, a plan, a directory…)")
        height, width, frames = int(header.Rows), int(header.Columns), int(header.get("NumberOfFrames") or 1)
        check_size(height, width, max_pixels)
        if not 1 <= frames <= max_pixels // (height * width):
            raise BadSample("over pixel limit", f"{frames} frames of {width} x {height} pixels, more than {max_pixels}")
        if header.get("SOPClassUID") == _WHOLE_SLIDE:
            raise BadSample("unsupported image", "a DICOM whole slide: use a source of `slides`")
        if str(header.get("BurnedInAnnotation", "")).strip().upper() == "YES" and not burned_in:
            raise BadSample(
                "burned-in annotation", "BurnedInAnnotation is YES: set burned_in: true at the source to use it anyway"
            )
        syntax = _syntax(header)
        if (decoder := plugin(syntax)) is None:
            raise BadSample(
                "unsupported transfer syntax",
                f"{syntax.name} ({syntax}) has no decoder here: install an imagecodecs that has, or rewrite the files "
                "uncompressed, e.g. by gdcmconv --raw",
            )

    def pixels(_: int) -> np.ndarray:
        with _told_by_kind():
            rgb = _decode(header, syntax, frames // 2, frames, decoder)
            if rgb.min() == rgb.max():
                raise BadSample("zero contrast", f"every pixel is shown as {rgb.min()}")
            return rgb

    return Picture(height, width, scalable=False, pixels=pixels)


@contextmanager
def _told_by_kind() -> Iterator[None]:
    """Whatever a hostile file makes pydicom raise is a broken image; its message may quote the file and is dropped."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except BadSample:
        raise
    except Exception as error:
        raise BadSample("broken image", f"DICOM that cannot be read ({type(error).__name__})") from None


def _read(data: bytes, max_pixels: int) -> Any:
    if uid.DeflatedExplicitVRLittleEndian.encode() in data[:1024]:
        # 128 + 4 bytes, then an element of 12 that says how long the rest of the file's meta information is.
        unpack, start = zlib.decompressobj(-zlib.MAX_WBITS), 144 + int.from_bytes(data[140:144], "little")
        unpack.decompress(data[start:], 4 * max_pixels + _MAX_HEADER)
        if unpack.unconsumed_tail:
            raise BadSample("over pixel limit", "deflated DICOM that unpacks to more than the pixel limit allows")
    return pydicom.dcmread(io.BytesIO(data), specific_tags=_ELEMENTS, force=True)


def _syntax(header: Any) -> uid.UID:
    """The transfer syntax; where a file does not say, the one by which its elements could be read."""
    if "TransferSyntaxUID" in header.file_meta:
        return header.file_meta.TransferSyntaxUID
    implicit, little = header.original_encoding
    return uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian


def _decode(ds: Any, syntax: uid.UID, index: int, frames: int, decoder: str) -> np.ndarray:
    """One frame as it is shown: uint8 (rows, columns, 3)."""
    if syntax in CODESTREAMS:
        offsets = ds.get("ExtendedOffsetTable"), ds.get("ExtendedOffsetTableLengths")
        extended = (offsets[0], offsets[1]) if offsets[0] and offsets[1] else None
        frame = get_frame(ds.PixelData, index, number_of_frames=frames, extended_offsets=extended)
        _check_codestream(frame, int(ds.Rows), int(ds.Columns))
    elif syntax.is_encapsulated:
        pass  # RLE: pydicom compares the lengths
    elif ds.get("PixelData") is not None and len(ds.PixelData) < _native_bytes(ds, frames):
        raise BadSample("broken image", "DICOM ends before its pixels do")
    array, meta = get_decoder(syntax).as_array(ds, index=index, decoding_plugin=decoder)
    photometric = str(meta["photometric_interpretation"])
    if photometric in ("MONOCHROME1", "MONOCHROME2"):
        grey = _grey(array, ds)
        return np.broadcast_to((255 - grey if photometric == "MONOCHROME1" else grey)[..., None], (*grey.shape, 3))
    bits = int(ds.BitsStored)
    if photometric == "PALETTE COLOR":
        array = apply_color_lut(array, ds)
        bits = 8 * array.itemsize
    if photometric not in ("PALETTE COLOR", "RGB") or array.ndim != 3:
        raise BadSample("unsupported image", "DICOM that is neither grey, RGB, YBR nor palette")
    array = array[..., :3]
    return array if array.dtype == np.uint8 and bits == 8 else np.rint(array * (255 / (2.0**bits - 1))).astype(np.uint8)


def _native_bytes(ds: Any, frames: int) -> int:
    samples = int(ds.Rows) * int(ds.Columns) * int(ds.SamplesPerPixel) * frames
    if ds.PhotometricInterpretation == "YBR_FULL_422":
        samples = samples * 2 // 3
    return (samples * int(ds.BitsAllocated) + 7) // 8


def _grey(array: np.ndarray, ds: Any) -> np.ndarray:
    """Stored values to uint8 of the same shape; black is the least value, whatever the photometric interpretation."""
    low, high = array.min(), array.max()
    if "VOILUTSequence" not in ds and _window(ds) is None:
        seen = array[~_padding(array, ds)]
        if seen.size:
            low, high = seen.min(), seen.max()
            array = np.clip(array, low, high)
    if array.dtype.kind in "iu" and int(high) - int(low) < _TABLE:
        table = _tones(np.arange(int(low), int(high) + 1).astype(array.dtype), ds)
        return table[array.astype(np.int64) - int(low)]
    return _tones(array, ds)


def _padding(array: np.ndarray, ds: Any) -> np.ndarray:
    """Bool, true where a pixel is only there to make the picture rectangular."""
    value = ds.get("PixelPaddingValue")
    if value is None:
        return np.zeros(array.shape, dtype=bool)
    limit = ds.get("PixelPaddingRangeLimit")
    ends = sorted((int(value), int(value if limit is None else limit)))
    return (array >= ends[0]) & (array <= ends[1])


def _window(ds: Any) -> tuple[float, float] | None:
    """(centre, width) of the first window."""
    first = [np.atleast_1d(np.asarray(ds.get(name), dtype=object)) for name in ("WindowCenter", "WindowWidth")]
    if any(not len(values) or values[0] in (None, "") for values in first):
        return None
    return float(first[0][0]), float(first[1][0])


def _tones(stored: np.ndarray, ds: Any) -> np.ndarray:
    values = apply_modality_lut(stored, ds)
    if ds.get("VOILUTSequence"):
        share = apply_voi(values, ds) / (2.0 ** int(ds.VOILUTSequence[0].LUTDescriptor[2]) - 1)
    elif (window := _window(ds)) is not None:
        share = windowed(values, *window, str(ds.get("VOILUTFunction") or "LINEAR").upper())
    else:
        values = values.astype(np.float64)
        low, high = np.nanmin(values), np.nanmax(values)
        share = (values - low) / max(high - low, np.finfo(np.float64).tiny)
    return np.rint(np.clip(np.nan_to_num(share), 0, 1) * 255).astype(np.uint8)


def windowed(values: np.ndarray, centre: float, width: float, function: str = "LINEAR") -> np.ndarray:
    """Values to 0..1 through a window: PS3.3 C.11.2.1.2 and C.11.2.1.3.

    Own, since pydicom's `apply_windowing` scales to the range of stored values, and by a negative rescale slope to that
    range upside down.

    Raises:
        BadSample: an unknown function, or no width.
    """
    if not np.isfinite([centre, width]).all() or width < (1 if function == "LINEAR" else np.finfo(float).tiny):
        raise BadSample("broken image", "DICOM window without a width")
    if function == "LINEAR":  # pixels are classes one wide, so the first and last half lie outside
        return np.clip((values - (centre - 0.5)) / max(width - 1, np.finfo(float).tiny) + 0.5, 0, 1)
    if function == "LINEAR_EXACT":
        return np.clip((values - centre) / width + 0.5, 0, 1)
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -700, 700)))
    raise BadSample("unsupported image", "DICOM with a VOI LUT function other than LINEAR, LINEAR_EXACT and SIGMOID")


def _check_codestream(frame: bytes, height: int, width: int) -> None:
    """A frame that would decode to another size, or that stops before its end marker, is refused before decoding."""
    if codestream_size(frame) != (height, width):
        raise BadSample("broken image", "DICOM whose compressed frame is not of the size that its header says")
    if not frame.rstrip(b"\0\xff").endswith(b"\xff\xd9"):
        raise BadSample("broken image", "DICOM ends before its pixels do")


def codestream_size(frame: bytes) -> tuple[int, int] | None:
    """(height, width) by the header of a JPEG, JPEG-LS or JPEG 2000 codestream (a JP2 file too); None without one."""
    if frame[:2] == b"\xff\xd8":
        place = 2
        while frame[place : place + 1] == b"\xff" and place + 9 <= len(frame):
            kind = frame[place + 1]
            if kind == 0xFF:
                place += 1
            elif kind == 0xF7 or (0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC)):  # start of a frame
                return int.from_bytes(frame[place + 5 : place + 7], "big"), int.from_bytes(
                    frame[place + 7 : place + 9], "big"
                )
            else:
                place += 2 + int.from_bytes(frame[place + 2 : place + 4], "big")
        return None
    start = frame.find(b"\xff\x4f\xff\x51", 0, 4096)  # start of a codestream, size
    if start < 0 or len(frame) < start + 24:
        return None
    x, y, x0, y0 = (int.from_bytes(frame[start + k : start + k + 4], "big") for k in (8, 12, 16, 20))
    return y - y0, x - x0
