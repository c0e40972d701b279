"""Tiled TIFFs read tile by tile: Aperio SVS, generic tiled TIFF, OME-TIFF.

openslide spends three quarters of its time on other things than decoding. Here a tile is one `pread`, one splice and
one call of libjpeg-turbo: the same pixels as openslide's to the bit, or less of them at 1/2, 1/4 or 1/8 scale. All of
it lets go of the GIL.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import tifffile
from PIL import Image

from slides import jpeg
from slides.assemble import blank, paste
from slides.errors import SlideError, TileError
from slides.reader import Level

_JPEG = 7
JPEG2000 = (33005, 34712)  # RGB. Aperio's 33003 (YCbCr) is left to openslide
_LOSSLESS = (1, 5, 8, 32946, 32773, 34925, 50000)  # none, LZW, deflate, packbits, LZMA, zstd
DEEP = "its pixels have more than 8 bits: convert them to 8, scaled as its scanner's manual says"
MAX_TILE = 1 << 26  # bytes of a stored tile, and pixels of one; no scanner comes near


class UnfitTiff(Exception):
    """A TIFF that is stored in a way that this reader leaves to others. Says which."""


@dataclass(frozen=True)
class Plane:
    """Where the tiles of one level lie.

    Args:
        level: its geometry.
        offsets: int64 (rows, columns), in the file.
        counts: int64 (rows, columns), bytes.
        codec: TIFF's number of the compression.
        head: what makes a JPEG tile a file of its own, see `jpeg.prefix`.
        rgb: bytes of a tile that is no JPEG, and its number, to uint8 (h, w, 3).
    """

    level: Level
    offsets: np.ndarray
    counts: np.ndarray
    codec: int
    head: bytes
    rgb: Callable[[bytes, int], np.ndarray]

    @property
    def scalable(self) -> bool:
        """Whether a tile at reduced scale costs less than the whole one."""
        return self.codec == _JPEG


def plane(page: tifffile.TiffPage, downsample: float) -> Plane:
    """The tiles of a TIFF page.

    Raises:
        UnfitTiff: it is stored in a way that is not read here.
        SlideError: its header makes no sense, to whoever reads it.
    """
    samples, bits = page.samplesperpixel, page.bitspersample
    if not page.is_tiled or page.imagedepth != 1 or page.tiledepth != 1:
        raise UnfitTiff("it has no tiles")
    columns, rows = -(-page.imagewidth // page.tilewidth), -(-page.imagelength // page.tilelength)
    planes = samples if page.planarconfig == 2 else 1
    if page.tilewidth * page.tilelength > MAX_TILE or len(page.dataoffsets) != columns * rows * planes:
        raise SlideError(
            f"{page.parent.filename}: its header is broken: {len(page.dataoffsets)} tiles of {page.tilewidth} x "
            f"{page.tilelength} for {page.imagewidth} x {page.imagelength} pixels: copy or export it again"
        )
    if bits > 8:  # openslide would take the upper eight, which are black where a camera has twelve
        raise SlideError(f"{page.parent.filename}: {DEEP}")
    if bits != 8 or page.sampleformat not in (1, None):
        raise UnfitTiff(f"its samples have {bits} bits")
    if page.planarconfig != 1 and samples > 1:
        raise UnfitTiff("its colours are stored apart")
    if (int(page.photometric), samples) not in ((1, 1), (2, 3), (2, 4), (6, 3)):
        raise UnfitTiff(f"its {samples} channels are {page.photometric!r}")
    codec = int(page.compression)
    if codec != _JPEG and codec not in JPEG2000 and codec not in _LOSSLESS:
        raise UnfitTiff(f"its compression is {page.compression!r}")
    if codec == _JPEG and samples == 4:
        raise UnfitTiff(f"its JPEG tiles have {samples} channels")
    if codec in JPEG2000 and samples != 3:
        raise UnfitTiff(f"its JPEG 2000 tiles have {samples} channels")
    if codec not in (_JPEG, *JPEG2000) and page.photometric == 6:
        raise UnfitTiff("its YCbCr samples are not JPEG")
    try:
        offsets = np.array(page.dataoffsets, np.int64).reshape(rows, columns)
        counts = np.array(page.databytecounts, np.int64).reshape(rows, columns)
    except (ValueError, OverflowError):
        raise UnfitTiff(f"it counts the bytes of {len(page.databytecounts)} of {columns} x {rows} tiles") from None
    tables = page.jpegtables or b""
    level = Level(page.imagewidth, page.imagelength, downsample, (page.tilewidth, page.tilelength))
    head = jpeg.prefix(tables, rgb=page.photometric == 2) if samples == 3 else tables[:-2] or b"\xff\xd8"
    shape = (page.tilelength, page.tilewidth)
    decode = page.decode if codec in _LOSSLESS else None
    alpha = page.extrasamples[0] if samples == 4 and page.extrasamples else 0

    def rgb(data: bytes, number: int) -> np.ndarray:
        assert decode is not None
        segment = decode(data, number)[0]
        if segment is None:
            raise ValueError("no pixels")
        return samples_on_white(np.asarray(segment).reshape(-1, *np.shape(segment)[-2:]), int(alpha), shape)

    return Plane(level, offsets, counts, codec, head, rgb)


def samples_on_white(pixels: np.ndarray, alpha: int, shape: tuple[int, int]) -> np.ndarray:
    """uint8 (h, w, 1 | 3 | 4) to RGB over white; border tiles are filled up to `shape`.

    `alpha` is TIFF's ExtraSamples: 1 for colours that are multiplied by it already, 2 for those that are not.
    """
    if pixels.shape[2] == 1:
        pixels = pixels.repeat(3, axis=2)
    elif pixels.shape[2] == 4:
        cover = pixels[..., 3:].astype(np.uint16) if alpha else np.full((1, 1, 1), 255, np.uint16)
        colour = pixels[..., :3].astype(np.uint16)
        colour = colour if alpha == 1 else (colour * cover + 127) // 255
        pixels = np.minimum(colour + (255 - cover), 255).astype(np.uint8)
    if pixels.shape[:2] == shape:
        return pixels
    whole = blank(*shape)
    whole[: pixels.shape[0], : pixels.shape[1]] = pixels
    return whole


class TiffSlide:
    """A slide whose levels are tiled TIFF pages; see `reader.Slide`."""

    def __init__(
        self,
        path: Path,
        planes: list[Plane],
        *,
        mpp: float,
        mpp_source: str,
        properties: Mapping[str, str],
        icc: bytes | None = None,
    ) -> None:
        self.path = path
        self.planes = planes
        self.levels = tuple(one.level for one in planes)
        self.size = (self.levels[0].width, self.levels[0].height)
        self.mpp, self.mpp_source = mpp, mpp_source
        self.properties, self.icc = properties, icc
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise SlideError(f"{path}: cannot be read ({error.strerror})") from None

    def scalable(self, level: int) -> bool:
        """Whether tiles of a level decode faster at reduced scale."""
        return self.planes[level].scalable

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        out = np.empty((height, width, 3), np.uint8)
        paste(out, x, y, self.levels[level], lambda column, row: self.read_tile(level, column, row))
        return out

    def read_tile(self, level: int, column: int, row: int, reduce: int = 1) -> np.ndarray | None:
        stored = self._stored(level, column, row)
        if stored is None:
            return None
        one = self.planes[level]
        width, height = one.level.tile or (0, 0)
        try:
            if one.codec == _JPEG:
                return jpeg.decode(jpeg.standalone(stored, one.head), width, height, reduce)
            if one.codec in JPEG2000:
                pixels = _jpeg2000(stored, width, height)
            else:
                pixels = one.rgb(stored, row * one.offsets.shape[1] + column)
        except Exception as error:  # decoders raise anything
            raise self._broken(level, column, row, str(error) or type(error).__name__) from None
        if reduce > 1:
            pixels = cv2.resize(pixels, (width // reduce, height // reduce), interpolation=cv2.INTER_AREA)
        return pixels

    def tile_jpeg(self, level: int, column: int, row: int) -> bytes | None:
        one = self.planes[level]
        if one.codec != _JPEG:
            return None
        stored = self._stored(level, column, row)
        if stored is None:
            return None
        try:
            file = jpeg.standalone(stored, one.head)
            jpeg.check_whole(file)
            if (held := jpeg.size(file)) != one.level.tile:
                raise jpeg.BrokenJpeg(f"holds {held[0]} x {held[1]} pixels")
        except jpeg.BrokenJpeg as error:
            raise self._broken(level, column, row, str(error)) from None
        return file

    def _stored(self, level: int, column: int, row: int) -> bytes | None:
        one = self.planes[level]
        offset, count = int(one.offsets[row, column]), int(one.counts[row, column])
        if offset == 0 or count == 0:
            return None
        if offset < 0 or not 0 < count <= MAX_TILE:
            raise self._broken(level, column, row, f"{count} bytes at {offset} make no sense")
        try:
            stored = os.pread(self._file, count, offset)
        except OSError as error:
            raise self._broken(level, column, row, f"cannot be read ({error.strerror})") from None
        if len(stored) < count:
            raise self._broken(level, column, row, f"the file ends after {len(stored)} of its {count} bytes")
        return stored

    def _broken(self, level: int, column: int, row: int, why: str) -> TileError:
        return TileError(f"{self.path.name}: tile ({column}, {row}) of level {level}: {' '.join(why.split())}")

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> TiffSlide:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _jpeg2000(data: bytes, width: int, height: int) -> np.ndarray:
    """By Pillow.

    Whole: leaving the finest wavelets out would take 2/5 of the time, but keeps every second pixel's neighbourhood
    rather than averages, a quarter of a pixel aside (25 dB from averages at half scale, JPEG's scaled decoding 54).
    """
    with Image.open(io.BytesIO(data), formats=["JPEG2000"]) as image:
        if image.size != (width, height) or image.mode != "RGB":
            raise ValueError(f"holds {image.mode} of {image.size}, not RGB of {width} x {height}")
        return np.asarray(image)
