from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from slides.errors import SlideError
from slides.geojson import polygons
from slides.mask import Mask, coverage, from_geometries, read_png

masks = arrays(np.bool_, st.tuples(st.integers(1, 9), st.integers(1, 9)))


def boxes(mask: Mask) -> shapely.Polygon:
    """The mask as a union of its pixels, by shapely alone (a polygon or several)."""
    union = shapely.union_all([shapely.box(x, y, x + 1, y + 1) for y, x in np.argwhere(mask.array).tolist()])
    return cast(shapely.Polygon, union)


@settings(deadline=None, max_examples=60)
@given(
    masks,
    st.floats(0.3, 40),
    st.lists(st.tuples(st.integers(-60, 400), st.integers(-60, 400)), min_size=1, max_size=12),
    st.floats(0.5, 300),
)
def test_coverage_is_the_area_that_shapely_finds(
    array: np.ndarray, downsample: float, at: list[tuple[int, int]], side: float
) -> None:
    mask = Mask(array, downsample)
    tissue = shapely.affinity.scale(boxes(mask), downsample, downsample, origin=(0, 0))
    expected = [tissue.intersection(shapely.box(x, y, x + side, y + side)).area / side**2 for x, y in at]
    np.testing.assert_allclose(coverage(mask, np.array(at), side), expected, atol=2e-6)


def test_any_memory_layout() -> None:
    array = np.random.default_rng(0).random((50, 70)) < 0.5
    at = np.array([[0, 0], [13, 28], [31, 5]])
    for view in (array.T, array[::-1, ::-2], np.asfortranarray(array)):
        np.testing.assert_array_equal(coverage(Mask(view, 1.5), at, 20), coverage(Mask(view.copy("C"), 1.5), at, 20))
        assert polygons(Mask(view, 1.5)) == polygons(Mask(view.copy("C"), 1.5))


def test_full_and_empty_squares_have_exactly_one_and_zero() -> None:
    array = np.zeros((700, 900), bool)
    array[100:600, 200:800] = True
    got = coverage(Mask(array, 16.013), np.array([[4000, 2000], [4001, 2003], [0, 0], [20_000, 0]]), 512.7)
    np.testing.assert_array_equal(got, np.array([1, 1, 0, 0], np.float32))


def test_a_square_half_outside_the_slide_is_half_covered() -> None:
    mask = Mask(np.ones((10, 10), bool), 10)
    np.testing.assert_allclose(coverage(mask, np.array([[-16, 10], [84, 84], [100, 0]]), 32), [0.5, 0.25, 0])


@given(masks, st.floats(0.1, 100))
def test_area(array: np.ndarray, downsample: float) -> None:
    mask = Mask(array, downsample)
    assert mask.area == pytest.approx(boxes(mask).area * downsample**2)


@settings(deadline=None, max_examples=60)
@given(masks, masks, st.integers(1, 4))
def test_set_operations_between_resolutions_are_those_of_the_regions(
    fine: np.ndarray, coarse: np.ndarray, times: int
) -> None:
    one, two = Mask(fine, 2.0, "one"), Mask(coarse, 2.0 * times, "two")
    region = boxes(one)
    other = shapely.affinity.scale(boxes(two), times, times, origin=(0, 0))
    for got, expected in ((one & two, region.intersection(other)), (one.minus(two), region.difference(other))):
        assert (got.downsample, got.array.shape, got.name) == (2.0, fine.shape, "one")
        assert got.area == pytest.approx(expected.area * 4)
    assert (two & one).area == (one & two).area
    assert two.minus(one).area == pytest.approx(other.difference(region).area * 4)


def test_what_is_no_mask_is_refused() -> None:
    for array, downsample in (
        (np.zeros((2, 2), np.uint8), 1.0),
        (np.zeros((2, 2, 3), bool), 1.0),
        (np.zeros((0, 4), bool), 1.0),
    ):
        with pytest.raises(SlideError, match="bool array"):
            Mask(array, downsample)
    for downsample in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(SlideError, match="above 0"):
            Mask(np.zeros((2, 2), bool), downsample)


# read_png


MODES = ["1", "L", "RGB", "RGBA", "LA", "P", "I;16"]


@pytest.mark.parametrize(("mode", "suffix"), [*((mode, end) for mode in MODES for end in ("png", "tif")), ("F", "tif")])
def test_every_kind_of_pixel_means_the_same(tmp_path: Path, mode: str, suffix: str) -> None:
    wanted = np.random.default_rng(0).random((30, 40)) < 0.3
    grey = Image.fromarray(wanted.astype(np.uint8))
    if mode in ("1", "P"):
        image = Image.fromarray(wanted.astype(np.uint8) * 255).convert("1") if mode == "1" else grey.copy()
        if mode == "P":
            image = Image.new("P", (40, 30))
            image.putpalette([255, 255, 255, 0, 0, 0])  # 0 is white: the index counts
            image.putdata(wanted.astype(int).ravel().tolist())
    elif mode in ("RGBA", "LA"):
        image = grey.convert(mode)
        image.putpixel((0, 0), (255,) * (len(mode) - 1) + (0,))  # transparent
        wanted[0, 0] = False
    elif mode == "I;16":
        image = Image.fromarray(wanted.astype(np.uint16) * 256)
    else:
        image = grey.convert(mode)
    image.save(tmp_path / f"mask.{suffix}")
    mask = read_png(tmp_path / f"mask.{suffix}", (4000, 3000))
    np.testing.assert_array_equal(mask.array, wanted)
    assert mask.downsample == 100


def test_a_mask_is_stretched_over_the_slide(tmp_path: Path) -> None:
    """1 % too low: its last row still ends where the slide ends."""
    pixels = np.zeros((99, 200), np.uint8)
    pixels[49:] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    mask = read_png(tmp_path / "mask.png", (20_000, 10_000))
    assert (mask.downsample, mask.array.shape) == (100, (100, 200))
    assert coverage(mask, np.array([[0, 9900]]), 100)[0] == 1
    assert mask.array.mean() == pytest.approx(50 / 99, abs=0.01)


def test_masks_that_cannot_be_read(tmp_path: Path) -> None:
    Image.new("L", (100, 100)).save(tmp_path / "square.png")
    with pytest.raises(SlideError, match=r"square\.png: the mask is 100 x 100 pixels, the slide 2000 x 1900"):
        read_png(tmp_path / "square.png", (2000, 1900))
    with pytest.raises(SlideError, match="100 x 100 pixels, the limit is 9999"):
        read_png(tmp_path / "square.png", (100, 100), pixel_limit=9999)
    (tmp_path / "text.png").write_text("no image")
    Image.new("L", (100, 100)).save(tmp_path / "photo.jpg")
    whole = (tmp_path / "square.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    for name in ("text.png", "photo.jpg", "half.png", "absent.png"):
        with pytest.raises(SlideError, match=name):
            read_png(tmp_path / name, (100, 100))


# from_geometries


def test_a_pixel_is_in_when_its_centre_is() -> None:
    """Against shapely's own point-in-polygon test, on triangles at random places with a hole."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        ring = rng.uniform(-20, 220, (rng.integers(3, 9), 2))
        shapes = shapely.make_valid(shapely.Polygon(ring)).difference(shapely.Point(100, 80).buffer(30))
        mask = from_geometries([shapes], (200, 150), 2.5)
        x, y = np.meshgrid((np.arange(80) + 0.5) * 2.5, (np.arange(60) + 0.5) * 2.5)
        np.testing.assert_array_equal(mask.array, shapely.contains_xy(shapes, x, y))


def test_overlapping_polygons_are_a_union_and_holes_stay_open() -> None:
    ring = shapely.Point(100, 100).buffer(60, 64) - shapely.Point(100, 100).buffer(30, 64)
    bar = shapely.box(90, 20, 110, 180)
    both = from_geometries([ring, bar, shapely.MultiPolygon([bar])], (200, 200), 1)
    assert both.area == pytest.approx(ring.union(bar).area, rel=0.01)
    assert both.array[100, 100] and not both.array[100, 80]


def test_broken_and_areless_geometries() -> None:
    bow = shapely.Polygon([(0, 0), (100, 100), (100, 0), (0, 100)])
    assert not bow.is_valid
    others = [shapely.Point(5, 5), shapely.LineString([(0, 0), (9, 90)]), shapely.Polygon()]
    mixed = shapely.GeometryCollection([shapely.box(120, 0, 140, 100), shapely.Point(0, 0)])
    assert from_geometries([bow, *others, mixed], (200, 100), 1).area == pytest.approx(5000 + 2000, rel=0.01)
    assert from_geometries([], (200, 100), 4).array.shape == (25, 50)
    assert from_geometries([shapely.box(-50, -50, 500, 500)], (201, 99), 4).array.sum() == 51 * 25
