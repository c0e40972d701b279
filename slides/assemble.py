"""A rectangle put together from tiles."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from slides.reader import Level


def blank(height: int, width: int) -> np.ndarray:
    """White, which is what a slide has where it has nothing."""
    return np.full((height, width, 3), 255, np.uint8)


def paste(
    out: np.ndarray, x: int, y: int, level: Level, tile: Callable[[int, int], np.ndarray | None], reduce: int = 1
) -> bool:
    """Fill `out` with the rectangle of a level whose corner is (x, y); white where there is nothing.

    Args:
        out: uint8 (h, w, 3), at 1/`reduce` of the level.
        x: in the level's pixels; a multiple of `reduce`.
        y: likewise.
        level: with tiles.
        tile: (column, row) to its pixels at 1/`reduce`, or None for one that was not scanned.
        reduce: see `Slide.read_tile`.

    Returns:
        Whether all of it that lies inside the slide was scanned.
    """
    assert level.tile is not None
    wide, high = level.tile[0] // reduce, level.tile[1] // reduce
    left, top = x // reduce, y // reduce
    # What a border tile holds beyond the slide is padding.
    right = min(left + out.shape[1], -(-level.width // reduce))
    bottom = min(top + out.shape[0], -(-level.height // reduce))
    whole = True
    if left < 0 or top < 0 or right < left + out.shape[1] or bottom < top + out.shape[0]:
        out.fill(255)  # all other patches are covered by tiles, and need no white first
    if right <= max(left, 0) or bottom <= max(top, 0):
        return whole  # beside the slide, though perhaps on the padding of its last tiles
    for row in range(max(top, 0) // high, -(-bottom // high)):
        y0, y1 = max(row * high, top), min(row * high + high, bottom)
        for column in range(max(left, 0) // wide, -(-right // wide)):
            pixels = tile(column, row)
            x0, x1 = max(column * wide, left), min(column * wide + wide, right)
            here = out[y0 - top : y1 - top, x0 - left : x1 - left]
            if pixels is None:
                whole = False
                here.fill(255)
            else:
                here[:] = pixels[y0 - row * high : y1 - row * high, x0 - column * wide : x1 - column * wide]
    return whole
