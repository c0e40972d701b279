from __future__ import annotations

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from slides.errors import SlideError
from slides.mask import Mask
from slides.tiling import grid, tiles

sizes = st.tuples(st.integers(1, 3000), st.integers(1, 3000))
lengths = st.floats(40, 900)


def painted(coords: np.ndarray, side: int, size0: tuple[int, int]) -> np.ndarray:
    """How many squares lie over each level-0 pixel, by painting them one by one."""
    count = np.zeros(size0[::-1], int)
    for x, y in coords:
        count[y : y + side, x : x + side] += 1
    return count


@settings(deadline=None, max_examples=40)
@given(st.tuples(st.integers(1, 400), st.integers(1, 400)), st.integers(20, 200), st.integers(0, 19))
def test_every_pixel_is_in_a_square_and_in_one_alone_without_overlap(
    size0: tuple[int, int], side: int, overlap: int
) -> None:
    overlap = min(overlap, side // 2)
    assert (painted(grid(size0, side, side), side, size0) == 1).all()
    over = painted(grid(size0, side, side - overlap), side, size0)
    assert over.min() >= 1 and over.max() <= 4  # two each way


@settings(deadline=None, max_examples=60)
@given(sizes, lengths, st.sampled_from([1, 2, 4, 8, 16]))
def test_fractional_grids_neither_drift_nor_leave_gaps(size0: tuple[int, int], side: float, snap: int) -> None:
    coords = grid(size0, side, side, snap=snap)
    assert not (coords % snap).any()
    for axis in (0, 1):
        at = np.unique(coords[:, axis])
        exact = np.arange(len(at)) * side
        assert np.abs(at - exact).max() <= snap / 2 + 1e-9
        assert at[0] == 0 and at[-1] + side + snap >= size0[axis]
        assert len(at) == 1 or at[-2] + side < size0[axis]  # and no row too many
        assert len(at) <= 1 or np.abs(np.diff(at) - side).max() <= snap
    assert len(np.unique(coords, axis=0)) == len(coords)


def test_no_drift_after_ten_thousand_steps() -> None:
    """Adding 256 / 0.503 ten thousand times over, rounded, would be off by hundreds."""
    step = 128 / 0.2513
    at = grid((5_100_000, 10), step, step)[:, 0]
    assert at[10_000] == round(10_000 * step)


def test_order_and_borders() -> None:
    np.testing.assert_array_equal(
        grid((250, 150), 100, 100), [[0, 0], [100, 0], [200, 0], [0, 100], [100, 100], [200, 100]]
    )
    np.testing.assert_array_equal(grid((250, 150), 100, 100, edge="drop"), [[0, 0], [100, 0]])
    np.testing.assert_array_equal(grid((250, 90), 100, 100, origin=(30, 7)), [[30, 7], [130, 7], [230, 7]])
    assert len(grid((50, 50), 100, 100)) == 1 and len(grid((50, 50), 100, 100, edge="drop")) == 0
    # A last square would begin inside, but the one before reaches the border already.
    np.testing.assert_array_equal(grid((300, 10), 100, 50)[:, 0], [0, 50, 100, 150, 200])
    np.testing.assert_array_equal(grid((300, 10), 100, 140)[:, 0], [0, 140, 280])


@settings(deadline=None, max_examples=50)
@given(
    arrays(np.bool_, st.tuples(st.integers(1, 8), st.integers(1, 8))),
    st.floats(4, 40),
    st.floats(10, 120),
    st.floats(0.4, 1.5),
    st.floats(0, 1),
)
def test_tiles_equal_a_slow_loop_with_shapely(
    array: np.ndarray, downsample: float, side: float, stride: float, threshold: float
) -> None:
    size0 = (int(array.shape[1] * downsample), int(array.shape[0] * downsample))
    tissue = shapely.union_all(
        [
            shapely.box(*(np.array([column, row, column + 1, row + 1]) * downsample))
            for row, column in np.argwhere(array)
        ]
    )
    coords, share = tiles(Mask(array, downsample), size0, side, side * stride, threshold)
    found = {(int(x), int(y)): float(s) for (x, y), s in zip(coords, share, strict=True)}
    for x, y in grid(size0, side, side * stride):
        expected = tissue.intersection(shapely.box(x, y, x + side, y + side)).area / side**2
        if abs(expected - threshold) > 1e-5:
            assert ((x, y) in found) == (expected > threshold)
        if (x, y) in found:
            assert found[(x, y)] == pytest.approx(expected, abs=1e-5)


@settings(deadline=None, max_examples=40)
@given(arrays(np.bool_, st.tuples(st.integers(1, 12), st.integers(1, 12))), st.integers(5, 60), st.integers(1, 9))
def test_all_tissue_is_in_a_square_when_a_trace_is_enough(array: np.ndarray, side: int, downsample: int) -> None:
    size0 = (array.shape[1] * downsample, array.shape[0] * downsample)
    coords, share = tiles(Mask(array, float(downsample)), size0, side, side, 1e-6)
    tissue = np.repeat(np.repeat(array, downsample, 0), downsample, 1)
    assert (painted(coords, side, size0)[tissue] == 1).all()
    assert share.min(initial=1) > 0
    # The shares add up to all the tissue: nothing is counted twice.
    assert share.sum() * side**2 == pytest.approx(tissue.sum(), rel=1e-4)


def test_thresholds_mean_what_they_say() -> None:
    """Seven of ten columns covered is 0.7, though float32(0.7) < 0.7; and 1 takes whole squares."""
    array = np.zeros((10, 20), bool)
    array[:, 3:] = True
    mask = Mask(array, 1.0)
    for threshold, expected in ((0, 2), (0.7, 2), (0.70001, 1), (1, 1)):
        assert len(tiles(mask, (20, 10), 10, 10, threshold)[0]) == expected


def test_without_a_mask_the_whole_slide_counts() -> None:
    coords, share = tiles(None, (250, 200), 100, 100, 0)
    assert len(coords) == 6
    np.testing.assert_allclose(share, [1, 1, 0.5, 1, 1, 0.5])
    assert len(tiles(None, (250, 200), 100, 100, 0.6)[0]) == 4


def test_no_tissue_no_tiles() -> None:
    coords, share = tiles(Mask(np.zeros((5, 5), bool), 100.0), (500, 500), 100, 100, 0.1)
    assert coords.shape == (0, 2) and coords.dtype == np.int64 and share.shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"side": 0.0}, "above 0"),
        ({"step": -1.0}, "above 0"),
        ({"side": np.nan}, "above 0"),
        ({"step": 3.0, "snap": 8}, "below the 8"),
        ({"step": 1e-5, "snap": 1}, "below the 1"),
        ({"step": 1.0, "side": 1.0}, "too many"),
        ({"edge": "shift"}, "keep or drop"),
    ],
)
def test_grids_that_make_no_sense(arguments: dict, match: str) -> None:
    with pytest.raises(SlideError, match=match):
        grid((100_000, 100_000), **{"side": 100.0, "step": 100.0, **arguments})


def test_a_coverage_in_percent_is_refused() -> None:
    with pytest.raises(SlideError, match="from 0 to 1"):
        tiles(None, (100, 100), 10, 10, 50)
