"""A heat map as a slide of its own: a tiled, pyramidal TIFF that QuPath and openslide open beside the original.

Tile by tile, so that a map of 10^10 pixels takes no more memory than its grid. The lower levels are means of values,
not of colours: a colour map is no straight line, and the mean of its ends is none of its colours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from slides.errors import SlideError
from slides.heat_colours import Scale
from slides.heat_image import blend_at
from slides.heatmap import HeatMap
from slides.levels import best_level
from slides.pyramid import Encoding, level_sizes, write_pyramid
from slides.reader import Slide

_TILE = 512
_SMALLEST = 1024  # longest side of the last level


def write_heat_tiff(
    path: Path,
    heat: HeatMap,
    scale: Scale,
    *,
    mpp: float,
    downsample: int = 1,
    compression: Literal["jpeg", "deflate"] = "jpeg",
    over: Slide | None = None,
    alpha: float = 1.0,
) -> Path:
    """Write it; it bears its name only once it is complete.

    Args:
        path: of the file.
        heat: the map.
        scale: of its colours.
        mpp: of the slide's level 0; the file's tags say `mpp` x `downsample`.
        downsample: level-0 pixels a pixel of the file's own level 0; 1 is the slide's resolution.
        compression: jpeg (quality 90, 4:4:4), or deflate, which keeps every colour.
        over: the slide, whose pixels are then under the map; every one of them is read. Without it, what is no patch
            is white.
        alpha: how much of the map is seen where it lies over something.

    Raises:
        SlideError: no such downsample or compression, or the file cannot be written.
        TileError: part of the slide below is broken.
    """
    if not isinstance(downsample, int) or downsample < 1:
        raise SlideError(f"a TIFF at downsample {downsample}: give a whole number, 1 for the slide's resolution")
    if compression not in ("jpeg", "deflate"):
        raise SlideError(f"a TIFF compressed by {compression}: choose jpeg or deflate")
    encoding = Encoding(compression, 90, subsampling="444")
    size = (max(heat.size[0] // downsample, 1), max(heat.size[1] // downsample, 1))
    downs = [1]
    while max(size) / downs[-1] > _SMALLEST:
        downs.append(downs[-1] * 4)
    sizes = level_sizes(size, downs)
    colours = np.full((heat.grid.shape[0] + 1, heat.grid.shape[1] + 1, 3), 255, np.uint8)
    colours[:-1, :-1][heat.real] = scale.colour(heat.grid[heat.real])
    plain: dict[bytes, bytes] = {}  # tiles of one colour, by it

    def tile(level: int, column: int, row: int) -> np.ndarray | bytes:
        down, (wide, high) = downsample * downs[level], sizes[level]
        x, y = column * _TILE, row * _TILE
        width, height = min(_TILE, wide - x), min(_TILE, high - y)
        if over is not None:
            return blend_at(_pixels(over, x, y, width, height, down), heat, scale, alpha, x=x, y=y, downsample=down)
        if down > heat.cell:
            paper = np.full((height, width, 3), 255, np.uint8)
            return blend_at(paper, heat, scale, 1.0, x=x, y=y, downsample=down)
        rows, columns = (
            _within(heat.cells(first, count, down, axis), most)
            for axis, first, count, most in ((1, y, height, colours.shape[0]), (0, x, width, colours.shape[1]))
        )
        part = colours[np.unique(rows)[:, None], np.unique(columns)]
        if (part == part[0, 0]).all():
            key = part[0, 0].tobytes()
            if key not in plain:
                plain[key] = encoding.encode(np.broadcast_to(part[0, 0], (_TILE, _TILE, 3)))
            return plain[key]
        return colours[rows[:, None], columns]

    return write_pyramid(
        path,
        size,
        tile,
        mpp=mpp * downsample,
        downsamples=downs,
        tile_size=_TILE,
        encoding=encoding,
        flavour="generic",
    )


def _within(cells: np.ndarray, most: int) -> np.ndarray:
    """Rows of the table of colours; its last one stands for all that lies beyond the grid."""
    return np.where((cells < 0) | (cells >= most - 1), most - 1, cells)


def _pixels(slide: Slide, x: int, y: int, width: int, height: int, downsample: int) -> np.ndarray:
    """uint8 (height, width, 3) of the slide at a downsample, from the coarsest level that is fine enough."""
    number = best_level([one.downsample for one in slide.levels], downsample)
    share = downsample / slide.levels[number].downsample
    left, top = round(x * share), round(y * share)
    wide, high = max(round((x + width) * share) - left, 1), max(round((y + height) * share) - top, 1)
    pixels = slide.read(number, left, top, wide, high)
    return (
        pixels if (wide, high) == (width, height) else cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    )
