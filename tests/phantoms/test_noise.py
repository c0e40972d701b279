"""Geometry that the drawing rests on, against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medclip.phantoms.noise import GRID, bank, cell_borders, enlarge, grid_axes, lattice, lookup, ramp, smooth, streaks
from medclip.phantoms.phantom import region_boxes


@pytest.mark.parametrize(("spacing", "um", "jitter"), [(13.0, 56.0, 0.25), (46.0, 224.0, 0.3), (13.0, 224.0, 0.25)])
def test_cell_borders_are_half_the_gap_between_the_two_nearest_points(spacing: float, um: float, jitter: float) -> None:
    points = lattice(np.random.default_rng(3), spacing, um, jitter)
    x, y = np.broadcast_arrays(*grid_axes(um))
    gaps = np.hypot(x[..., None] - points[..., 0].ravel(), y[..., None] - points[..., 1].ravel())
    nearest = np.partition(gaps, 1, axis=-1)[..., :2]
    assert np.allclose(cell_borders(points, spacing, um), (nearest[..., 1] - nearest[..., 0]) / 2, atol=2e-3 * um / 56)


def test_a_lattice_covers_the_field_evenly_without_overlap() -> None:
    um, spacing, jitter = 100.0, 8.0, 0.2
    points = lattice(np.random.default_rng(0), spacing, um, jitter).reshape(-1, 2)
    assert points.min() < -spacing and points.max() > um + spacing
    gaps = np.hypot(*(points[:, None] - points[None]).transpose(2, 0, 1)) + 1e9 * np.eye(len(points))
    assert gaps.min() > spacing * (1 - 2 * np.sqrt(2) * jitter)
    inside = ((points > 0) & (points < um)).all(1)
    assert inside.sum() == pytest.approx((um / spacing) ** 2, rel=0.15)


def test_noise_has_unit_variance_and_wraps() -> None:
    for sigma in (0.0, 1.0):
        assert bank(sigma).std() == pytest.approx(1, abs=0.01) and abs(bank(sigma).mean()) < 0.01
    seam = np.abs(bank(1.0)[:, 0] - bank(1.0)[:, -1]).mean()
    assert seam == pytest.approx(np.abs(np.diff(bank(1.0)[:, :500], axis=1)).mean(), rel=0.1)
    with pytest.raises(ValueError, match="read-only"):
        bank(1.0)[0, 0] = 1
    fields = np.stack([smooth(np.random.default_rng(i), 12) for i in range(20)])
    assert 0.5 < fields.std() < 1.5
    # twelve bumps across a field: half way through a bump is far less alike than the neighbouring pixel
    near, far = (np.corrcoef(fields[:, :, d:].ravel(), fields[:, :, :-d].ravel())[0, 1] for d in (1, GRID // 12))
    assert near > 0.95 and far < 0.5


def test_fibres_run_along_their_direction() -> None:
    fibre, direction = streaks(np.random.default_rng(0), 112.0, 224, 0.3, 0.0, 40.0, 1.5)
    assert np.allclose(np.mod(direction, np.pi), 0.3, atol=0.02)
    slope_y, slope_x = np.gradient(fibre)
    along = slope_x * np.cos(0.3) + slope_y * np.sin(0.3)
    across = slope_y * np.cos(0.3) - slope_x * np.sin(0.3)
    assert across.std() > 5 * along.std()


def test_ramp_and_lookup() -> None:
    assert ramp(np.asarray([-1, -0.5, 0, 0.25, 0.5, 3], np.float32), 1.0).tolist() == [0, 0, 0.5, 0.75, 1, 1]
    field = np.arange(16).reshape(4, 4)
    at = np.asarray([[0.1, 0.1], [39.9, 0.1], [0.1, 39.9], [-50, 15.0], [99, 99]])
    assert lookup(field, at, 40.0).tolist() == [0, 3, 12, 4, 15]


@given(st.integers(0, 10**6), st.sampled_from([56, 112]), st.sampled_from([64, 224, 300]))
@settings(max_examples=60, deadline=None)
def test_boxes_hold_their_region_and_no_more_than_interpolation_explains(seed: int, cells: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    axis = (np.arange(cells) + 0.5) / cells
    centres, radii = rng.uniform(-0.2, 1.2, (3, 2)), rng.uniform(0.02, 0.3, 3)
    away = np.hypot(axis[None, None] - centres[:, :1, None], axis[None, :, None] - centres[:, 1:, None])
    distances = (radii[:, None, None] - away).astype(np.float32)
    boxes = region_boxes("disc", distances, size)
    regions = [region for d in distances if (region := enlarge(d, size) > 0).any()]
    slack = 2 * size / cells + 1
    by_hand = []
    for region in regions:
        rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
        by_hand.append((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    # A region that only grazes a coarse cell may have a box and no pixel.
    assert len(boxes) >= len(by_hand)
    for exact in by_hand:
        fits = [
            box
            for _, *box in boxes
            if box[0] <= exact[0] and box[1] <= exact[1] and box[2] >= exact[2] and box[3] >= exact[3]
            and np.abs(np.subtract(box, exact)).max() <= slack
        ]  # fmt: skip
        assert fits
    assert all(0 <= x0 < x1 <= size and 0 <= y0 < y1 <= size for _, x0, y0, x1, y1 in boxes)
