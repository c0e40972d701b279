"""JPEG tiles as TIFF stores them: abbreviated streams, whose tables and colour space stand elsewhere.

A tile becomes a JPEG file of its own by splicing in the shared tables and an Adobe segment (APP14) that says what the
TIFF's photometric tag says. Without it decoders guess: an Aperio "RGB" tile comes out as YCbCr, 50 grey values off.
"""

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np
import simplejpeg

_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_APP14 = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"  # and one byte: 0 RGB, 1 YCbCr
# In entropy-coded data a 0xff is followed by 0 (stuffing), a restart marker, or padding.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_SOS, _ALL_COEFFICIENTS = 0xDA, b"\0\x3f\0"  # what a scan of a baseline JPEG must say that it holds


class BrokenJpeg(ValueError):
    """A stream that does not decode without doubt."""


@lru_cache(maxsize=256)
def prefix(tables: bytes, rgb: bool) -> bytes:
    """What stands before a tile's own segments: SOI, the Adobe segment, the shared tables (TIFF's JPEGTables)."""
    body = tables[2 if tables[:2] == _SOI else 0 : -2 if tables[-2:] == _EOI else None]
    return _SOI + _APP14 + (b"\0" if rgb else b"\1") + body


def standalone(tile: bytes, head: bytes) -> bytes:
    """A tile's stream as a file of its own.

    Args:
        tile: as stored.
        head: of `prefix`.

    Raises:
        BrokenJpeg: it does not begin as a JPEG, or not end as one.
    """
    if tile[:2] != _SOI:
        raise BrokenJpeg(f"begins with {tile[:4].hex()}, no JPEG")
    if tile[-2:] != _EOI:
        tile = tile.rstrip(b"\0")  # some scanners pad
        if tile[-2:] != _EOI:
            raise BrokenJpeg("ends early")
    begin = 2
    # Segments of its own that speak of colour would contradict ours (JFIF means YCbCr).
    while begin + 4 <= len(tile) and tile[begin] == 0xFF and 0xE0 <= tile[begin + 1] <= 0xEF:
        begin += 2 + int.from_bytes(tile[begin + 2 : begin + 4], "big")
    return head + tile[begin:]


def check_whole(file: bytes) -> None:
    """Look for what a decoder would stumble over, without decoding: markers inside the compressed pixels.

    Raises:
        BrokenJpeg: there is one, or there are no pixels.
    """
    inside = _MARKER.search(file, _scan(file))
    if inside is None or inside.start() != len(file) - 2:
        raise BrokenJpeg("its compressed data is broken")


def _scan(file: bytes) -> int:
    """Where the compressed pixels begin, behind the first scan's header.

    Raises:
        BrokenJpeg: there are none.
    """
    at = 2
    while at + 4 <= len(file) and file[at] == 0xFF:
        end = at + 2 + int.from_bytes(file[at + 2 : at + 4], "big")
        if file[at + 1] == _SOS and end < len(file):
            return end
        at = end
    raise BrokenJpeg("its header is broken")


def size(file: bytes) -> tuple[int, int]:
    """(width, height) as its header says.

    Raises:
        BrokenJpeg: libjpeg cannot make sense of the header.
    """
    try:
        height, width = simplejpeg.decode_jpeg_header(file)[:2]
    except ValueError as error:
        raise BrokenJpeg(str(error)) from None
    return int(width), int(height)


def decode(file: bytes, width: int, height: int, reduce: int) -> np.ndarray:
    """uint8 RGB (height / reduce, width / reduce, 3), by libjpeg's scaled inverse DCT where reduce is 2, 4 or 8.

    Raises:
        BrokenJpeg: libjpeg had to guess, or the stream has another size.
    """
    if (held := size(file)) != (width, height):  # asked first: 65,535 x 65,535 pixels can stand in a few bytes
        raise BrokenJpeg(f"holds {held[0]} x {held[1]} pixels, its tile {width} x {height}")
    try:
        pixels = simplejpeg.decode_jpeg(file, "RGB", min_height=height // reduce, min_width=width // reduce)
    except ValueError as error:
        return decode(_mended(file, str(error)), width, height, reduce)
    if pixels.shape[:2] != (height // reduce, width // reduce):
        raise BrokenJpeg(f"gives {pixels.shape[1]} x {pixels.shape[0]} pixels at 1/{reduce} of {width} x {height}")
    return pixels


def _mended(file: bytes, warning: str) -> bytes:
    """The file without what libjpeg warns of, where that leaves every pixel in place.

    libjpeg tells only its first warning, so a harmless one is not passed over but mended, and the file read again.
    Bytes left over at the end are harmless where they are zeros; others mean that decoding lost its way.

    Raises:
        BrokenJpeg: it does harm.
    """
    left_over = re.search(r"(\d+) extraneous bytes before marker 0xd9", warning)
    if left_over is not None:
        end = len(file) - 2 - int(left_over[1])
        if not file[end:-2].strip(b"\0"):
            return file[:end] + _EOI
    if "Invalid SOS parameters" in warning:
        start = _scan(file)
        if file[start - 3 : start] != _ALL_COEFFICIENTS:
            return file[: start - 3] + _ALL_COEFFICIENTS + file[start:]
    raise BrokenJpeg(warning)
