"""A mask of a slide: which part of it is meant, at any resolution, and how much of a square it covers.

Where two masks meet, or a square and a mask, level-0 coordinates are the common ground: pixel (row, column) of a mask
is the square from (column, row) x downsample to (column + 1, row + 1) x downsample.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import shapely
from PIL import Image
from shapely.geometry.base import BaseGeometry

from slides.errors import SlideError

_MAX_ANISOTROPY = 0.02


@dataclass(frozen=True)
class Mask:
    """Part of a slide.

    Args:
        array: bool (h, w).
        downsample: level-0 pixels per mask pixel, the same in x and y.
        name: what it shows.

    Raises:
        SlideError: the array is no bool image or empty, or the downsample not above 0.
    """

    array: np.ndarray
    downsample: float
    name: str = "tissue"

    def __post_init__(self) -> None:
        if self.array.ndim != 2 or self.array.dtype != np.bool_ or not self.array.size:
            raise SlideError(
                f"mask {self.name!r} is {self.array.dtype} of shape {self.array.shape}: give a bool array (h, w)"
            )
        if not 0 < self.downsample < np.inf:
            raise SlideError(f"mask {self.name!r} has downsample {self.downsample}: give a number above 0")

    @property
    def area(self) -> float:
        """In level-0 pixels²."""
        return float(np.count_nonzero(self.array)) * self.downsample**2

    def __and__(self, other: Mask) -> Mask:
        """What is in both, on the finer of the two grids."""
        one, two = self._on_one_grid(other)
        return Mask(one.array & two.array, one.downsample, self.name)

    def __or__(self, other: Mask) -> Mask:
        """What is in either, on the finer of the two grids, within the extent of this mask."""
        one, two = self._on_one_grid(other)
        return Mask(one.array | two.array, one.downsample, self.name)

    def minus(self, other: Mask) -> Mask:
        """What is in this mask but not in `other`, on the finer of the two grids."""
        one, two = self._on_one_grid(other)
        return Mask(one.array & ~two.array, one.downsample, self.name)

    def _on_one_grid(self, other: Mask) -> tuple[Mask, Mask]:
        """Both on the finer grid, over the extent of this mask."""
        downsample = min(self.downsample, other.downsample)
        ratio = self.downsample / downsample
        shape = tuple(int(np.ceil(side * ratio - 1e-9)) for side in self.array.shape)
        return self._resampled(shape, downsample), other._resampled(shape, downsample)

    def _resampled(self, shape: tuple[int, ...], downsample: float) -> Mask:
        """On another grid: each of its pixels is what lies under its centre; nothing beyond the mask."""
        if shape == self.array.shape and downsample == self.downsample:
            return self
        inside = self.array
        for axis in (0, 1):
            at = ((np.arange(shape[axis]) + 0.5) * (downsample / self.downsample)).astype(np.int64)
            # One row or column of False at the end stands for all that lies beyond.
            padded = np.concatenate([inside, np.zeros_like(inside.take([0], axis))], axis)
            inside = padded.take(np.minimum(at, inside.shape[axis]), axis)
        return replace(self, array=inside, downsample=downsample)


def coverage(mask: Mask, coords: np.ndarray, side: float) -> np.ndarray:
    """The share of each square that the mask covers; exact, with fractional borders.

    Between the corners of its pixels the integral of a mask is bilinear, so interpolating a summed-area table (Crow
    1984) has no error but rounding. What lies outside the slide is not covered.

    Args:
        mask: the mask.
        coords: (N, 2) x and y of the squares' top-left corners, in level-0 pixels.
        side: of the squares, in level-0 pixels.

    Returns:
        float32 (N,) in [0, 1].
    """
    height, width = mask.array.shape
    table = cv2.integral(mask.array.view(np.uint8))  # int32 (h + 1, w + 1): enough for 46,000 x 46,000 pixels
    corners = np.asarray(coords, np.float64).reshape(-1, 2)
    left, right = (np.clip((corners[:, 0] + d) / mask.downsample, 0, width) for d in (0, side))
    top, bottom = (np.clip((corners[:, 1] + d) / mask.downsample, 0, height) for d in (0, side))
    covered = _at(table, right, bottom) - _at(table, left, bottom) - _at(table, right, top) + _at(table, left, top)
    return np.clip(covered * (mask.downsample / side) ** 2, 0, 1).astype(np.float32)


def _at(table: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Bilinear interpolation of a summed-area table at points inside it."""
    x0, y0 = x.astype(np.int64), y.astype(np.int64)
    fx, fy = x - x0, y - y0
    x1, y1 = np.minimum(x0 + 1, table.shape[1] - 1), np.minimum(y0 + 1, table.shape[0] - 1)
    above = table[y0, x0] * (1 - fx) + table[y0, x1] * fx
    below = table[y1, x0] * (1 - fx) + table[y1, x1] * fx
    return above * (1 - fy) + below * fy


def read_png(path: Path, size0: tuple[int, int], pixel_limit: int = 100_000_000, name: str = "tissue") -> Mask:
    """The user's own mask, a PNG or TIFF of the whole slide at any resolution: what is not 0 is meant.

    In colour, a pixel counts where one channel is above 0; with alpha, also the alpha must be; of a palette, the index.

    Args:
        path: of the image.
        size0: (width, height) of the slide's level 0, over which the image is stretched.
        pixel_limit: most pixels to read.
        name: of the mask.

    Raises:
        SlideError: it cannot be read, is over the limit, or its aspect ratio is not the slide's within 2 % (and the
            rounding of a pixel).
    """
    try:
        with warnings.catch_warnings(), Image.open(path, formats=("PNG", "TIFF")) as image:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            width, height = image.size
            if width * height > pixel_limit:
                raise SlideError(
                    f"{path}: the mask has {width} x {height} pixels, the limit is {pixel_limit}: shrink it"
                )
            pixels = np.asarray(image)
            alpha = image.mode in ("LA", "RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SlideError(f"{path}: cannot be read as a PNG or TIFF mask ({error})") from None
    meant = pixels > 0
    if meant.ndim == 3:
        colour = meant[..., :-1] if alpha else meant
        meant = np.logical_or.reduce(colour, axis=-1) & (meant[..., -1] if alpha else True)
    sx, sy = size0[0] / width, size0[1] / height
    # In a small image, rounding its sides to whole pixels weighs more.
    if abs(sx / sy - 1) > max(_MAX_ANISOTROPY, 1 / width + 1 / height):
        raise SlideError(
            f"{path}: the mask is {width} x {height} pixels, the slide {size0[0]} x {size0[1]}: give a mask of the "
            "whole slide, in its aspect ratio"
        )
    rows = max(1, round(size0[1] / sx))
    if rows != height:
        meant = meant[((np.arange(rows) + 0.5) * (height / rows)).astype(np.int64)]
    return Mask(np.ascontiguousarray(meant), sx, name)


def from_geometries(
    geometries: Iterable[BaseGeometry], size0: tuple[int, int], downsample: float, name: str = "tissue"
) -> Mask:
    """The union of polygons as a mask: a pixel is in it when its centre is.

    Every edge marks, in each row, the first centre to the right of it with +1 or -1 by its direction; summed along the
    row that is the winding number, above 0 inside of exteriors and not of their holes, however polygons overlap. A mask
    that `geojson.polygons` traced comes back bit by bit.

    Args:
        geometries: polygons and multi-polygons in level-0 pixels; invalid rings are repaired; points and lines, which
            have no area, are passed over.
        size0: (width, height) of the slide's level 0; what lies outside of it is cut off.
        downsample: of the mask.
        name: of the mask.
    """
    width, height = (max(1, int(np.ceil(side / downsample - 1e-9))) for side in size0)
    steps = np.zeros((height, width + 1), np.int32)
    for polygon in areas(geometries):
        polygon = shapely.geometry.polygon.orient(polygon)
        for ring in (polygon.exterior, *polygon.interiors):
            _add_ring(steps, shapely.get_coordinates(ring) / downsample)
    np.cumsum(steps, axis=1, out=steps)
    return Mask(steps[:, :-1] > 0, downsample, name)


def areas(geometries: Iterable[BaseGeometry]) -> list[shapely.Polygon]:
    """The valid polygons that geometries consist of, however nested or broken; points and lines are left out."""
    found: list[shapely.Polygon] = []
    for geometry in geometries:
        if not geometry.is_valid:
            geometry = shapely.make_valid(geometry)
        if isinstance(geometry, shapely.Polygon):
            found += [geometry] if not geometry.is_empty else []
        elif isinstance(geometry, shapely.MultiPolygon | shapely.GeometryCollection):
            found += areas(geometry.geoms)
    return found


def _add_ring(steps: np.ndarray, ring: np.ndarray) -> None:
    """Mark where each row's centre line crosses a ring: int32 (h, w + 1), ring (N, 2) closed, in mask pixels."""
    (x0, y0), (x1, y1) = ring[:-1].T, ring[1:].T
    # Rows whose centre, row + 0.5, lies in [y0, y1) or [y1, y0): half-open, so a vertex counts once.
    first = np.clip(np.ceil(np.minimum(y0, y1) - 0.5), 0, len(steps)).astype(np.int64)
    count = np.clip(np.ceil(np.maximum(y0, y1) - 0.5), 0, len(steps)).astype(np.int64) - first
    edge = np.repeat(np.arange(len(count)), count)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count) + first[edge]
    x = x0[edge] + (row + 0.5 - y0[edge]) * ((x1 - x0)[edge] / (y1 - y0)[edge])
    column = np.clip(np.ceil(x - 0.5), 0, steps.shape[1] - 1).astype(np.int64)
    # Counter-clockwise in a y-up plane: the left side of an exterior runs downwards.
    np.add.at(steps, (row, column), np.where(y0 > y1, 1, -1)[edge])
