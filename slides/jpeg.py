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
_HARMLESS = ("extraneous bytes", "Invalid SOS parameters")  # libjpeg's warnings that leave every pixel in place


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
    while tile[begin] == 0xFF and 0xE0 <= tile[begin + 1] <= 0xEF and begin + 4 <= len(tile):
        begin += 2 + int.from_bytes(tile[begin + 2 : begin + 4], "big")
    return head + tile[begin:]


def check_whole(file: bytes) -> None:
    """Look for what a decoder would stumble over, without decoding: markers inside the compressed pixels.

    Raises:
        BrokenJpeg: there is one, or there are no pixels.
    """
    start = file.find(b"\xff\xda")
    inside = _MARKER.search(file, start + 2) if start >= 0 else None
    if inside is None or inside.start() != len(file) - 2:
        raise BrokenJpeg("its compressed data is broken")


def decode(file: bytes, width: int, height: int, reduce: int) -> np.ndarray:
    """uint8 RGB (height / reduce, width / reduce, 3), by libjpeg's scaled inverse DCT where reduce is 2, 4 or 8.

    Raises:
        BrokenJpeg: libjpeg had to guess, or the stream has another size.
    """
    try:
        pixels = simplejpeg.decode_jpeg(file, "RGB", min_height=height // reduce, min_width=width // reduce)
    except ValueError as error:
        if not any(harmless in str(error) for harmless in _HARMLESS):
            raise BrokenJpeg(str(error)) from None
        pixels = simplejpeg.decode_jpeg(
            file, "RGB", min_height=height // reduce, min_width=width // reduce, strict=False
        )
    if pixels.shape[:2] != (height // reduce, width // reduce):
        raise BrokenJpeg(
            f"holds {pixels.shape[1]} x {pixels.shape[0]} pixels at 1/{reduce}, its tile {width} x {height}"
        )
    return pixels
