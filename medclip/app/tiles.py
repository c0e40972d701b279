"""Deep-zoom tiles of a slide: JPEGs of a pyramid that halves at each step, as OpenSeadragon asks for them.

The last level is the slide's level 0, each before it has half as many pixels a side. Tiles have the side of the slide's
own, so that those of the levels that the file holds are handed on as they are stored; others are put together from
stored tiles decoded at 1/2, 1/4 or 1/8, and shrunk for what is left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np
import simplejpeg

from slides.assemble import blank, paste
from slides.errors import TileError
from slides.levels import best_level
from slides.overview import overview
from slides.reader import Level, Slide

_SIDE, _SMALLEST, _LARGEST = 256, 128, 512  # of tiles, where the slide has none; of tiles of its own that will do
_BLOCK = 2048  # pixels a side that are held at a time
_QUALITY = 85
PICTURE = 2048  # longest side of the picture that coarse tiles are cut from, where the file has no coarse level
_FAR = 8


@dataclass(frozen=True)
class Pyramid:
    """Where tiles lie.

    Args:
        width: of level 0 of the slide.
        height: likewise.
        side: of tiles.
    """

    width: int
    height: int
    side: int

    @classmethod
    def of(cls, slide: Slide) -> Pyramid:
        own = slide.levels[0].tile
        fits = own is not None and own[0] == own[1] and _SMALLEST <= own[0] <= _LARGEST
        return cls(*slide.size, own[0] if own is not None and fits else _SIDE)

    @cached_property
    def last(self) -> int:
        """Number of the finest level; the coarsest, 0, is one pixel."""
        return max(self.width - 1, self.height - 1, 0).bit_length()

    @cached_property
    def first(self) -> int:
        """Number of the finest level that is one tile: nobody needs a coarser one."""
        return max(self.last - max(math.ceil(math.log2(max(self.width, self.height) / self.side)), 0), 0)

    def downsample(self, level: int) -> int:
        return 1 << (self.last - level)

    def size(self, level: int) -> tuple[int, int]:
        """(width, height) of a level."""
        down = self.downsample(level)
        return -(-self.width // down), -(-self.height // down)

    def extent(self, level: int, column: int, row: int) -> tuple[int, int, int, int] | None:
        """(x, y, width, height) of a tile in its level's pixels; None where there is no such tile."""
        if not self.first <= level <= self.last or column < 0 or row < 0:
            return None
        width, height = self.size(level)
        x, y = column * self.side, row * self.side
        if x >= width or y >= height:
            return None
        return x, y, min(self.side, width - x), min(self.side, height - y)


@dataclass(frozen=True)
class Tile:
    """A JPEG, and how many stored tiles of it could not be decoded."""

    jpeg: bytes
    broken: int = 0


def tile(slide: Slide, pyramid: Pyramid, level: int, column: int, row: int) -> Tile | None:
    """A tile of the pyramid, or None where there is none. What is broken is hatched, the rest is shown."""
    extent = pyramid.extent(level, column, row)
    if extent is None:
        return None
    down = pyramid.downsample(level)
    stored = _stored(slide, pyramid, down, column, row)
    if stored is not None:
        return Tile(stored)
    x, y, width, height = extent
    pixels, broken = read(slide, x * down, y * down, width, height, down)
    return Tile(encode(pixels), broken)


def _stored(slide: Slide, pyramid: Pyramid, down: int, column: int, row: int) -> bytes | None:
    """The bytes of a tile that the file holds as it is wanted: whole, at the place, without padding."""
    side = pyramid.side
    for number, level in enumerate(slide.levels):
        inside = (column + 1) * side <= level.width and (row + 1) * side <= level.height
        if level.downsample == down and level.tile == (side, side) and inside:
            try:
                return slide.tile_jpeg(number, column, row)
            except TileError:
                return None
    return None


def read(slide: Slide, x: int, y: int, width: int, height: int, down: float) -> tuple[np.ndarray, int]:
    """Pixels of a slide at any scale, from the coarsest level that is fine enough.

    Args:
        slide: open.
        x: of the corner, in level-0 pixels.
        y: likewise.
        width: of the result.
        height: likewise.
        down: level-0 pixels a pixel of the result.

    Returns:
        uint8 (height, width, 3), white outside the slide and hatched where it is broken; how many reads were.
    """
    number = best_level([one.downsample for one in slide.levels], down)
    level = slide.levels[number]
    shrink = down / level.downsample
    step = max(int(_BLOCK / shrink), 1)  # of the result, at a time
    out, broken = blank(height, width), 0
    for top in range(0, height, step):
        for left in range(0, width, step):
            w, h = min(step, width - left), min(step, height - top)
            at = (x / level.downsample + left * shrink, y / level.downsample + top * shrink)
            pixels, bad = _block(slide, number, level, at, (w, h), shrink)
            out[top : top + h, left : left + w] = pixels
            broken += bad
    return out, broken


def _block(
    slide: Slide, number: int, level: Level, at: tuple[float, float], size: tuple[int, int], shrink: float
) -> tuple[np.ndarray, int]:
    """`size` pixels from `at`, which is in the level's own."""
    broken = 0
    reduce = 1
    if level.tile is not None and slide.scalable(number):
        whole = [r for r in (8, 4, 2) if r <= shrink * 1.001 and all(side % r == 0 for side in level.tile)]
        reduce = next((r for r in whole if all(float(value / r).is_integer() for value in at)), 1)
    factor = max(shrink / reduce, 1.0)
    left, top = round(at[0] / reduce), round(at[1] / reduce)
    # Sizes of levels are rounded up: the last pixel of a row would be mixed with the white beyond the slide.
    slack = math.ceil(factor)
    wide = _without_little(left, max(round(size[0] * factor), 1), -(-level.width // reduce), slack)
    high = _without_little(top, max(round(size[1] * factor), 1), -(-level.height // reduce), slack)
    if level.tile is None:
        try:
            pixels = slide.read(number, left, top, wide, high)
        except TileError:
            pixels, broken = hatched(high, wide), 1
    else:
        pixels = np.empty((high, wide, 3), np.uint8)

        def decoded(column: int, row: int) -> np.ndarray | None:
            nonlocal broken
            try:
                return slide.read_tile(number, column, row, reduce)
            except TileError:
                broken += 1
                assert level.tile is not None
                return hatched(level.tile[1] // reduce, level.tile[0] // reduce)

        paste(pixels, left * reduce, top * reduce, level, decoded, reduce)
    if pixels.shape[:2] != (size[1], size[0]):
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return pixels, broken


def _without_little(start: int, length: int, whole: int, slack: int) -> int:
    """A length that ends at `whole` where it would reach beyond it by `slack` or less."""
    beyond = start + length - whole
    return length - beyond if 0 < beyond <= min(slack, length - 1) else length


def hatched(height: int, width: int) -> np.ndarray:
    """What stands for pixels that cannot be decoded: grey stripes, which no tissue looks like."""
    stripes = (np.arange(height)[:, None] + np.arange(width)[None, :]) // 8 % 2
    return np.where(stripes[..., None] == 0, np.uint8(205), np.uint8(170)).repeat(3, axis=2)


def encode(pixels: np.ndarray) -> bytes:
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), _QUALITY, "RGB", "420")


def picture(slide: Slide, longest: int) -> np.ndarray:
    """The whole slide, uint8 (h, w, 3), its longer side about `longest` pixels or what there is.

    Raises:
        SlideError: nothing of it can be decoded.
    """
    return overview(slide, slide.mpp * max(max(slide.size) / longest, 1.0)).image


def is_far(slide: Slide, down: int) -> bool:
    """Whether a tile is better cut from `picture`: the slide has no level near, and one tile would read much of it."""
    nearest = slide.levels[best_level([one.downsample for one in slide.levels], down)].downsample
    return down / nearest > _FAR and down >= max(slide.size) / PICTURE


def cut(whole: np.ndarray, pyramid: Pyramid, level: int, column: int, row: int) -> Tile | None:
    """A tile of `picture(slide, PICTURE)`."""
    extent = pyramid.extent(level, column, row)
    if extent is None:
        return None
    x, y, width, height = extent
    size = pyramid.size(level)
    scaled = cv2.resize(whole, size, interpolation=cv2.INTER_AREA) if whole.shape[1::-1] != size else whole
    return Tile(encode(scaled[y : y + height, x : x + width]))
