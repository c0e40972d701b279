"""A slide's patches as files: encoded in the threads that decode, or handed on as they are stored.

A source tile that is the patch to the pixel needs neither decoding nor encoding: it passes through with its tables and
colour marker set right, without loss, smaller, and an order of magnitude faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg

from slides import jpeg
from slides.errors import SlideError, TileError
from slides.patches import CHUNK, CORRUPT, OK, Chunk, read_patches
from slides.plan import Plan
from slides.reader import Slide


@dataclass(frozen=True)
class Encoding:
    """How patches become files.

    Args:
        format: jpeg or png.
        quality: of JPEG, 1 to 100.
        subsampling: of JPEG's chroma: 420, 422 or 444.
        passthrough: hand on source tiles that are patches already.
    """

    format: str = "jpeg"
    quality: int = 90
    subsampling: str = "420"
    passthrough: bool = True

    def __post_init__(self) -> None:
        if self.format not in ("jpeg", "png") or not 1 <= self.quality <= 100:
            raise SlideError(f"format {self.format!r} of quality {self.quality}: choose jpeg or png, 1 to 100")
        if self.subsampling not in ("420", "422", "444"):
            raise SlideError(f"subsampling is {self.subsampling!r}: choose 420, 422 or 444")

    @property
    def ending(self) -> str:
        return "jpg" if self.format == "jpeg" else "png"

    def encode(self, pixels: np.ndarray) -> bytes:
        """uint8 (h, w, 3) RGB to a file."""
        if self.format == "jpeg":
            return simplejpeg.encode_jpeg(pixels, self.quality, colorsubsampling=self.subsampling)
        return cv2.imencode(".png", pixels[..., ::-1])[1].tobytes()


@dataclass(frozen=True)
class Made:
    """What became of a chunk: files, pixels uint8 (n, size, size, 3), or both; corrupt patches have an empty file."""

    files: list[bytes] | None
    pixels: np.ndarray | None


def stream(
    slide: Slide,
    plan: Plan,
    rows: slice,
    *,
    exact: bool = False,
    threads: int = 1,
    change: Callable[[np.ndarray], np.ndarray] | None = None,
    encoding: Encoding | None = None,
    want_files: bool = True,
    want_pixels: bool = False,
) -> Iterator[Chunk[Made]]:
    """Patches `rows` of the plan, in order."""
    encoding = encoding or Encoding()
    coords = plan.coords[rows]

    def then(pixels: np.ndarray, status: np.ndarray) -> Made:
        if change is not None:
            pixels = change(pixels)
        files = None
        if want_files:
            files = [b"" if s == CORRUPT else encoding.encode(p) for p, s in zip(pixels, status, strict=True)]
        return Made(files, pixels if want_pixels else None)

    def read(some: np.ndarray, workers: int) -> Iterator[Chunk[Made]]:
        return read_patches(slide, plan.geometry, some, then, exact=exact, threads=workers)

    whole = change is None and want_files and encoding.format == "jpeg" and encoding.passthrough
    tiles = stored_tiles(slide, plan, coords) if whole else None
    # Where few patches are tiles, reading them all together decodes each tile once and uses all threads.
    if tiles is None or (tiles[:, 0] >= 0).mean() < 0.5:
        yield from read(coords, threads)
        return
    for first in range(0, len(coords), CHUNK):
        part = slice(first, first + CHUNK)
        chunk = _passed(slide, plan.geometry.level, coords[part], tiles[part], first, read)
        yield _with_pixels(chunk, plan.geometry.size) if want_pixels else chunk


def stored_tiles(slide: Slide, plan: Plan, coords: np.ndarray) -> np.ndarray | None:
    """(column, row) of the tile that is the patch to the pixel, int64 (n, 2), -1 for patches that are none.

    None where none can be: other sizes, or a level that is resampled.
    """
    one = plan.geometry
    level = slide.levels[one.level]
    if one.read != one.size or level.tile != (one.size, one.size):
        return None
    places = np.rint(coords / level.downsample).astype(np.int64)
    inside = (places + one.size <= (level.width, level.height)).all(axis=1)  # border tiles hold padding
    aligned = (places % one.size == 0).all(axis=1)
    return np.where((inside & aligned)[:, None], places // one.size, -1)


def _passed(
    slide: Slide,
    level: int,
    coords: np.ndarray,
    tiles: np.ndarray,
    first: int,
    read: Callable[[np.ndarray, int], Iterator[Chunk[Made]]],
) -> Chunk[Made]:
    files: list[bytes] = [b""] * len(coords)
    status = np.zeros(len(coords), np.uint8)
    broken: list[str] = []
    rest: list[int] = []
    for k, (column, row) in enumerate(tiles.tolist()):
        if column < 0:
            rest.append(k)
            continue
        try:
            file = slide.tile_jpeg(level, column, row)
        except TileError as error:
            status[k] = CORRUPT
            broken.append(str(error))
            continue
        if file is None:
            rest.append(k)
        else:
            files[k] = file
            status[k] = OK
    if rest:
        for chunk in read(coords[rest], 1):
            for k, here in enumerate(rest[chunk.first : chunk.first + len(chunk.status)]):
                files[here], status[here] = (chunk.value.files or [])[k], chunk.status[k]
            broken += chunk.broken
    return Chunk(first, status, Made(files, None), tuple(dict.fromkeys(broken)))


def _with_pixels(chunk: Chunk[Made], size: int) -> Chunk[Made]:
    """The files' own pixels beside them; what does not decode is corrupt after all."""
    files, status, broken = list(chunk.value.files or []), chunk.status.copy(), list(chunk.broken)
    pixels = np.full((len(files), size, size, 3), 255, np.uint8)
    for k, file in enumerate(files):
        if not file:
            continue
        try:
            pixels[k] = jpeg.decode(file, size, size, 1)
        except jpeg.BrokenJpeg as error:
            files[k], status[k] = b"", CORRUPT
            broken.append(str(error))
    return Chunk(chunk.first, status, Made(files, pixels), tuple(dict.fromkeys(broken)))
