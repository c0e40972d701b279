"""Maps: grids are found however coordinates are rounded, overlap is a mean by area, glass has no value."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from slides.errors import SlideError
from slides.heatmap import HeatMap, heat_map

RNG = np.random.default_rng(0)


def lattice(columns: int, rows: int, step: float, origin: tuple[float, float] = (0, 0), snap: int = 1) -> np.ndarray:
    """Corners as extraction writes them: of a step that is not rounded, each on a multiple of `snap`."""
    x, y = np.meshgrid(np.arange(columns) * step + origin[0], np.arange(rows) * step + origin[1])
    return (np.rint(np.stack([x.ravel(), y.ravel()], 1) / snap) * snap).astype(np.int64)


def at(heat: HeatMap, x: float, y: float) -> float:
    """The value under a level-0 pixel."""
    return float(heat.sample(int(x), int(y), 1, 1, 1.0)[0][0, 0])


def by_pixels(values: np.ndarray, coords: np.ndarray, side: int, size: tuple[int, int]) -> np.ndarray:
    """The definition: each level-0 pixel has the mean of the patches that cover it."""
    total, count = np.zeros(size[::-1]), np.zeros(size[::-1])
    for value, (x, y) in zip(values, coords, strict=True):
        total[y : y + side, x : x + side] += value
        count[y : y + side, x : x + side] += 1
    with np.errstate(invalid="ignore"):
        return total / count


@pytest.mark.parametrize(
    ("step", "side", "snap"),
    [(64, 64, 1), (68.3, 68.3, 1), (68.27, 68, 1), (409.6, 410, 8), (128, 64, 1), (96, 64, 1), (32, 64, 1)],
)
def test_every_patch_of_a_grid_has_its_own_value(step: float, side: float, snap: int) -> None:
    """Also at the far end of 150 columns, where a rounded step would be several patches off."""
    coords = lattice(150, 7, step, (13, 40), snap)
    keep = RNG.random(len(coords)) < 0.6
    coords = coords[keep]
    values = RNG.standard_normal(len(coords))
    heat = heat_map(values, coords, side, (100_000, 100_000))
    if step >= side - 1:
        centres = coords + side / 2
        assert [at(heat, *centre) for centre in centres] == pytest.approx(values.tolist(), abs=1e-6)
        assert heat.real.sum() * heat.cell**2 == pytest.approx(len(values) * side**2, rel=0.02)
    else:
        expected = by_pixels(values, coords, int(side), tuple(int(v) for v in coords.max(0) + side))
        ours = heat.sample(0, 0, *expected.shape[::-1], 1.0)[0]
        assert np.allclose(ours, expected, equal_nan=True, atol=1e-5)


@pytest.mark.parametrize("overlap", [1 / 2, 1 / 4, 1 / 3, 7 / 8])
def test_overlap_is_the_mean_of_what_covers_a_pixel(overlap: float) -> None:
    side = 48
    coords = lattice(6, 5, side * (1 - overlap), (3, 5))
    coords = coords[RNG.random(len(coords)) < 0.7]
    values = RNG.standard_normal(len(coords))
    expected = by_pixels(values, coords, side, (320, 320))
    ours = heat_map(values, coords, side, (320, 320)).sample(0, 0, 320, 320, 1.0)[0]
    assert np.allclose(ours, expected, equal_nan=True, atol=1e-5)


def test_coordinates_on_no_grid() -> None:
    """Two pieces of tissue with grids of their own, as CLAM lays them: inside of either, each patch has its value."""
    one, two = lattice(5, 4, 64), lattice(5, 4, 64, (611, 37))
    coords = np.concatenate([one, two])
    values = RNG.standard_normal(len(coords))
    heat = heat_map(values, coords, 64, (1000, 400))
    assert heat.cell == 8
    ours = [at(heat, x + 32, y + 32) for x, y in coords]
    assert ours == pytest.approx(values.tolist(), abs=1e-5)
    assert heat.real.sum() * heat.cell**2 == pytest.approx(len(coords) * 64**2, rel=0.05)
    # Random places that overlap: near the mean by pixels, and covering what the patches cover.
    coords = RNG.integers(0, 400, (60, 2))
    values = RNG.standard_normal(60)
    expected = by_pixels(values, coords, 64, (470, 470))
    ours = heat_map(values, coords, 64, (470, 470)).sample(0, 0, 470, 470, 1.0)[0]
    both = ~np.isnan(ours) & ~np.isnan(expected)
    assert both.sum() / (~np.isnan(expected)).sum() > 0.95
    assert np.corrcoef(ours[both], expected[both])[0, 1] > 0.95


def test_coarse_pixels_are_the_mean_of_fine_ones() -> None:
    coords = lattice(9, 8, 20, (7, 11))
    coords = coords[RNG.random(len(coords)) < 0.6]
    heat = heat_map(RNG.standard_normal(len(coords)), coords, 20, (224, 192))
    fine, share = heat.sample(0, 0, 224, 192, 1.0)
    blocks = [part.reshape(6, 32, 7, 32).transpose(0, 2, 1, 3).reshape(6, 7, -1) for part in (fine, share)]
    values, covered = heat.sample(0, 0, 7, 6, 32.0)
    assert np.allclose(covered, blocks[1].mean(-1), atol=1e-5)
    with np.errstate(invalid="ignore"):
        expected = np.nansum(blocks[0], -1) / (~np.isnan(blocks[0])).sum(-1)
    assert np.allclose(values, expected, equal_nan=True, atol=1e-5)
    # A part of an image is that part of the whole.
    part = heat.sample(2, 3, 4, 2, 32.0)[0]
    assert np.allclose(part, values[3:5, 2:6], equal_nan=True)


def test_smoothing_is_a_gaussian_within_the_tissue() -> None:
    coords = lattice(40, 30, 50)
    values = RNG.standard_normal(len(coords))
    heat = heat_map(values, coords, 50, (2000, 1500), smooth=1.5)
    expected = gaussian_filter(values.reshape(30, 40), 1.5, truncate=6)
    assert np.allclose(heat.grid[10:20, 10:30], expected[10:20, 10:30], atol=2e-3)
    # Holes and borders neither shine nor bleed: a constant stays one, and no cell is gained or lost.
    some = RNG.random(len(coords)) < 0.5
    flat = heat_map(np.full(some.sum(), 3.0), coords[some], 50, (2000, 1500), smooth=2)
    assert np.array_equal(flat.real, heat_map(values[some], coords[some], 50, (2000, 1500)).real)
    assert np.allclose(flat.grid[flat.real], 3, atol=1e-5)


def test_values_that_are_not_finite_are_no_patches() -> None:
    heat = heat_map(np.array([1.0, np.nan, np.inf, 4.0]), lattice(4, 1, 10), 10, (40, 10))
    assert [at(heat, x, 5) for x in (5, 35)] == [1, 4] and np.isnan([at(heat, x, 5) for x in (15, 25)]).all()


def test_one_patch() -> None:
    heat = heat_map(np.array([2.0]), np.array([[30, 20]]), 64, (100, 100))
    values, _ = heat.sample(0, 0, 100, 100, 1.0)
    assert (~np.isnan(values)).sum() == 64 * 64 and values[20, 30] == values[83, 93] == 2 and np.isnan(values[19, 30])


@pytest.mark.parametrize(
    ("values", "coords", "side", "smooth", "says"),
    [
        (np.zeros(3), np.zeros((2, 2)), 10, 0, "give"),
        (np.zeros(2), np.zeros((2, 2)), 0, 0, "side 0"),
        (np.full(2, np.nan), np.zeros((2, 2)), 10, 0, "no patch has a finite value"),
        (np.zeros(2), np.zeros((2, 2)), 10, -1, "smooth is -1"),
        (np.zeros(2), np.array([[0, 0], [90_000, 90_003]]), 1, 0, "is the side of the patches right"),
    ],
)
def test_what_makes_no_map(values: np.ndarray, coords: np.ndarray, side: float, smooth: float, says: str) -> None:
    with pytest.raises(SlideError, match=says):
        heat_map(values, coords, side, (100_000, 100_000), smooth=smooth)
