"""Values of a slide's patches as a map: a grid of cells on the slide, and its value under any pixel of any resolution.

Patches on a grid become its cells; where they overlap, a cell is the mean of those that cover it, weighted by area.
Grids are found in the coordinates, since files round what they say of a patch's side, and the error would add up over
a slide. Coordinates on no grid (drawn at random, or a grid for each piece of tissue, as CLAM lays them) are
rastered at an eighth of a patch. Where no patch is, there is no value: glass never gets a colour.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np

from slides.errors import SlideError

_MOST_CELLS = 50_000_000
_FINEST = 8  # cells of a step
_OFF_GRID = 8  # cells of a patch's side, where there is no grid


@dataclass(frozen=True)
class HeatMap:
    """A grid of values over a slide.

    Args:
        grid: float32 (rows, columns), NaN where there is no patch.
        cell: side of a cell in level-0 pixels.
        origin: level-0 x and y of the grid's upper left corner.
        size: (width, height) of the slide's level 0.
    """

    grid: np.ndarray
    cell: float
    origin: tuple[float, float]
    size: tuple[int, int]

    @cached_property
    def real(self) -> np.ndarray:
        """bool (rows, columns): where there is a value."""
        return ~np.isnan(self.grid)

    @cached_property
    def _tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Summed-area tables (Crow 1984) of the values and of where there are some."""
        return cv2.integral(np.where(self.real, self.grid, 0).astype(np.float64)), cv2.integral(
            self.real.astype(np.float64)
        )

    def cells(self, first: int, count: int, downsample: float, axis: int) -> np.ndarray:
        """int64 (count,): rows (axis 1) or columns (axis 0) of the grid under the centres of pixels `first`…"""
        centres = (first + np.arange(count) + 0.5) * downsample
        return np.floor((centres - self.origin[axis]) / self.cell).astype(np.int64)

    def sample(self, x: int, y: int, width: int, height: int, downsample: float) -> tuple[np.ndarray, np.ndarray]:
        """The map under a rectangle of an image of the slide.

        Pixels finer than the cells take the value under their centre, so that a patch keeps its outline; coarser ones
        the mean of what they cover, exact, with fractional borders.

        Args:
            x: of the rectangle, in the image's pixels; also y, width and height.
            downsample: level-0 pixels a pixel of the image.

        Returns:
            float32 (height, width) values, NaN where there are none, and the share of each pixel that has some.
        """
        if downsample <= self.cell:
            columns, rows = self.cells(x, width, downsample, 0), self.cells(y, height, downsample, 1)
            high, wide = self.grid.shape
            inside = ((rows >= 0) & (rows < high))[:, None] & ((columns >= 0) & (columns < wide))
            values = self.grid[np.clip(rows, 0, high - 1)[:, None], np.clip(columns, 0, wide - 1)]
            values = np.where(inside, values, np.float32(np.nan))
            return values, (~np.isnan(values)).astype(np.float32)
        edges = [
            np.clip((np.arange(first, first + count + 1) * downsample - self.origin[axis]) / self.cell, 0, most)
            for axis, first, count, most in ((1, y, height, self.grid.shape[0]), (0, x, width, self.grid.shape[1]))
        ]
        total, covered = (_between(table, *edges) for table in self._tables)
        share = covered * (self.cell / downsample) ** 2
        with np.errstate(invalid="ignore", divide="ignore"):
            values = np.where(share > 1e-6, total / covered, np.nan)
        return values.astype(np.float32), np.clip(share, 0, 1).astype(np.float32)


def _between(table: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Sums between consecutive edges; between the corners of its cells an integral is bilinear."""
    for axis, edges in ((0, rows), (1, columns)):
        low = np.minimum(edges.astype(np.int64), table.shape[axis] - 1)
        high = np.minimum(low + 1, table.shape[axis] - 1)
        share = (edges - low).reshape((-1, 1) if axis == 0 else (1, -1))
        table = np.diff(table.take(low, axis) * (1 - share) + table.take(high, axis) * share, axis=axis)
    return table


def heat_map(
    values: np.ndarray, coords: np.ndarray, side: float, size: tuple[int, int], *, smooth: float = 0.0
) -> HeatMap:
    """A slide's map.

    Args:
        values: (n,) of the patches; those that are not finite count as no patch.
        coords: (n, 2) level-0 x and y of their upper left corners, on a grid or not.
        side: of a patch in level-0 pixels.
        size: (width, height) of level 0.
        smooth: standard deviation of a Gaussian, in sides of a patch. Only patches are averaged (the weights of those
            that are there are brought back to 1), so tissue stays within its outline and glass draws nothing down.

    Raises:
        SlideError: the arrays do not fit each other, no value is finite, or the patches are too small for a map.
    """
    values, coords = np.asarray(values, np.float64), np.asarray(coords, np.float64)
    if values.ndim != 1 or coords.shape != (len(values), 2) or not 0 < side < np.inf:
        raise SlideError(f"a map of {values.shape} values at {coords.shape} places, side {side}: give (n,) and (n, 2)")
    if not 0 <= smooth < 100:
        raise SlideError(f"smooth is {smooth}: choose 0 (none) or a number of patches, e.g. 1")
    good = np.isfinite(values)
    if not good.any():
        raise SlideError("no patch has a finite value: there is nothing to draw")
    values, coords = values[good], coords[good]
    place, origin, cell, span = _cells(coords, side)
    columns, rows = (np.floor(place.max(0) + span + 1e-6)).astype(int) + 1
    if rows * columns > _MOST_CELLS:
        raise SlideError(f"a map of {columns} x {rows} cells of {cell:g} pixels: is the side of the patches right?")
    total, weight = _spread(values, place, span, (int(rows), int(columns)))
    with np.errstate(invalid="ignore", divide="ignore"):
        grid = np.where(weight >= 0.5, total / weight, np.nan)
    grid = _trimmed(grid)
    if smooth:
        grid = _smoothed(grid, smooth * side / cell)
    return HeatMap(grid.astype(np.float32), cell, (float(origin[0]), float(origin[1])), (int(size[0]), int(size[1])))


def _cells(coords: np.ndarray, side: float) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Corners (n, 2) in cells, the grid's origin, the side of a cell, and of a patch in cells."""
    found = _lattice(coords, side)
    if found is not None:
        step, origin, index = found
        for parts in range(1, _FINEST + 1):
            span = side * parts / step
            if round(span) >= 1 and abs(span - round(span)) <= 0.03:
                return (index * parts).astype(np.float64), origin, step / parts, float(round(span))
    origin, cell = coords.min(0), side / _OFF_GRID
    return (coords - origin) / cell, origin, cell, float(_OFF_GRID)


def _lattice(coords: np.ndarray, side: float) -> tuple[float, np.ndarray, np.ndarray] | None:
    """Step, origin (2,) and int64 (n, 2) indices of the square grid that the coordinates lie on; None for none.

    The step is fitted to all of them: rounded to whole pixels, neighbours are not equally far from each other.
    """
    axes = [np.unique(coords[:, axis], return_inverse=True) for axis in (0, 1)]
    gaps = np.concatenate([np.diff(places) for places, _ in axes])
    if not len(gaps):
        return side, coords[0], np.zeros((len(coords), 2), np.int64)
    least = gaps.min()
    near = float(gaps[gaps < 1.5 * least].mean())
    for parts in (1, 2, 3, 4):  # of a sparse grid, neighbours may be missing everywhere
        if near / parts < 0.9 * side / _FINEST:
            return None
        index = [np.concatenate([[0], np.cumsum(np.rint(np.diff(p) / near * parts))]) for p, _ in axes]
        centred = [(p - p.mean(), i - i.mean()) for (p, _), i in zip(axes, index, strict=True)]
        step = float(sum((p * i).sum() for p, i in centred) / max(sum((i * i).sum() for _, i in centred), 1e-9))
        origin = np.array([(p - i * step).mean() for (p, _), i in zip(axes, index, strict=True)])
        off = max(np.abs(p - o - i * step).max() for (p, _), i, o in zip(axes, index, origin, strict=True))
        if off <= max(1.5, 0.02 * side):
            at = [i[back] for (_, back), i in zip(axes, index, strict=True)]
            return step, origin, np.stack(at, 1).astype(np.int64)
    return None


def _spread(
    values: np.ndarray, place: np.ndarray, span: float, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of values weighted by the area of each cell that a patch covers, and of the weights."""
    first = np.floor(place + 1e-6).astype(np.int64)
    reach = range(int(np.ceil(span - 1e-6)) + 1)
    # Share of cell `first + k` that [place, place + span] covers, by axis.
    shares = [
        [np.clip(np.minimum(p + span, f + k + 1) - np.maximum(p, f + k), 0, 1) for k in reach]
        for p, f in zip(place.T, first.T, strict=True)
    ]
    total, weight = np.zeros(shape[0] * shape[1]), np.zeros(shape[0] * shape[1])
    for k in reach:
        for m in reach:
            share = shares[0][k] * shares[1][m]
            some = share > 1e-6
            at = (first[some, 1] + m) * shape[1] + first[some, 0] + k
            weight += np.bincount(at, share[some], len(weight))
            total += np.bincount(at, share[some] * values[some], len(total))
    return total.reshape(shape), weight.reshape(shape)


def _trimmed(grid: np.ndarray) -> np.ndarray:
    """Without empty rows and columns at the end."""
    real = ~np.isnan(grid)
    rows, columns = (int(np.flatnonzero(real.any(axis))[-1]) + 1 if real.any() else 1 for axis in (1, 0))
    return grid[:rows, :columns]


def _smoothed(grid: np.ndarray, sigma: float) -> np.ndarray:
    """Normalised convolution (Knutsson & Westin 1993) with a Gaussian, where there was a value."""
    real = ~np.isnan(grid)
    radius = 2 * int(np.ceil(3 * sigma)) + 1
    above, below = (
        cv2.GaussianBlur(part, (radius, radius), sigma, borderType=cv2.BORDER_CONSTANT)
        for part in (np.where(real, grid, 0.0), real.astype(np.float64))
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(real, above / below, np.nan)
