"""The whole slide at a few µm a pixel: what tissue is found on and masks are drawn over."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np

from slides.assemble import blank
from slides.errors import SlideError, TileError
from slides.levels import best_level
from slides.reader import Slide

_BLOCK = 2048  # level pixels read at a time where there are no tiles
_MAX_PIXELS = 100_000_000


@dataclass(frozen=True)
class Overview:
    """A slide at low resolution.

    Args:
        image: uint8 (h, w, 3); what is broken or was not scanned is white.
        downsample: level-0 pixels a pixel.
        mpp: µm a pixel.
        broken: bool (h, w), where it could not be decoded; None where all could.
        broken_tiles: how many tiles (or blocks) that were.
    """

    image: np.ndarray
    downsample: float
    mpp: float
    broken: np.ndarray | None = None
    broken_tiles: int = 0


def overview(slide: Slide, mpp: float = 8.0, *, threads: int = 1) -> Overview:
    """Read all of a slide at `mpp`, each tile once and at the smallest scale that will do.

    Args:
        slide: open.
        mpp: µm a pixel; a finer slide is averaged, a coarser one is taken as it is.
        threads: decode at once.

    Raises:
        SlideError: more pixels than an overview should have, or nothing of the slide can be decoded.
    """
    width0, height0 = slide.size
    downsample = max(mpp / slide.mpp, 1.0)
    width, height = max(1, round(width0 / downsample)), max(1, round(height0 / downsample))
    if width * height > _MAX_PIXELS:
        raise SlideError(f"{slide.path.name}: an overview at {mpp:g} µm has {width} x {height} pixels: ask for coarser")
    number = best_level([one.downsample for one in slide.levels], downsample)
    level = slide.levels[number]
    shrink = downsample / level.downsample
    if level.tile is not None:
        reduce = max(r for r in (1, 2, 4, 8) if r <= shrink and all(side % r == 0 for side in level.tile))
        factor = _power_within(shrink / reduce, [side // reduce for side in level.tile])
        cell = level.tile
    else:
        reduce, factor = 1, max(1, int(shrink))
        cell = (factor * max(1, _BLOCK // factor),) * 2
    total = reduce * factor
    wide, high = cell[0] // total, cell[1] // total
    columns, rows = -(-level.width // cell[0]), -(-level.height // cell[1])
    canvas = blank(rows * high, columns * wide)
    errors: dict[tuple[int, int], TileError] = {}

    def fill(row: int) -> None:
        for column in range(columns):
            try:
                if level.tile is not None:
                    pixels = slide.read_tile(number, column, row, reduce)
                else:
                    pixels = slide.read(number, column * cell[0], row * cell[1], *cell)
            except TileError as error:
                errors[row, column] = error
                continue
            if pixels is not None:
                if level.tile is not None:
                    left = level.width - column * cell[0], level.height - row * cell[1]
                    pixels = _without_padding(pixels, left[0] // reduce, left[1] // reduce)
                if factor > 1:
                    pixels = cv2.resize(pixels, (wide, high), interpolation=cv2.INTER_AREA)
                canvas[row * high : (row + 1) * high, column * wide : (column + 1) * wide] = pixels

    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, range(rows)))
    else:
        for row in range(rows):
            fill(row)
    if len(errors) == rows * columns:
        raise SlideError(f"{slide.path.name}: none of its tiles can be decoded, e.g. {next(iter(errors.values()))}")
    extent = max(1, -(-level.height // total)), max(1, -(-level.width // total))
    inside = canvas[: extent[0], : extent[1]]
    broken = None
    if errors:
        grid = np.zeros((rows, columns), np.uint8)
        grid[tuple(np.array(list(errors)).T)] = 1
        grid = grid.repeat(high, axis=0).repeat(wide, axis=1)[: extent[0], : extent[1]]
        broken = cv2.resize(grid, (width, height), interpolation=cv2.INTER_NEAREST).astype(bool)
    if inside.shape[:2] != (height, width):
        inside = cv2.resize(inside, (width, height), interpolation=cv2.INTER_AREA)
    return Overview(np.ascontiguousarray(inside), width0 / width, slide.mpp * width0 / width, broken, len(errors))


def _without_padding(tile: np.ndarray, width: int, height: int) -> np.ndarray:
    """A tile whose pixels beyond (width, height) repeat the last ones: its padding is often black, and no tissue."""
    if width >= tile.shape[1] and height >= tile.shape[0]:
        return tile
    inside = tile[: max(height, 1), : max(width, 1)]
    more = [(0, whole - part) for whole, part in zip(tile.shape[:2], inside.shape[:2], strict=True)]
    return np.pad(inside, [*more, (0, 0)], mode="edge")


def _power_within(limit: float, sides: list[int]) -> int:
    """The largest power of two within a limit that divides all sides."""
    power = 1
    while power * 2 <= limit and all(side % (power * 2) == 0 for side in sides):
        power *= 2
    return power
