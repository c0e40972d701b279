"""GeoJSON of maps: squares with values that QuPath takes, regions that are the union of their patches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import shapely
from shapely.geometry import shape

from slides.errors import SlideError
from slides.geojson import read_geojson
from slides.heat_colours import Scale
from slides.heat_geojson import regions, threshold_of, tiles, write_features
from slides.heatmap import heat_map
from tests.slides.test_heatmap import lattice

SCALE = Scale(0, 1, "viridis", "")
RNG = np.random.default_rng(1)


def test_tiles_are_patches_within_the_slide(tmp_path: Path) -> None:
    coords = np.array([[0, 0], [64, 0], [128, 64], [-10, 90]])
    values = np.array([0.0, np.nan, 1.0, 0.5])
    path = tmp_path / "t.geojson"
    write_features(path, tiles(values, coords, 64, (170, 120), SCALE, "tumour"))
    found = json.loads(path.read_text())
    assert found["type"] == "FeatureCollection" and len(found["features"]) == 3  # NaN is none
    assert [shape(one["geometry"]).bounds for one in found["features"]] == [
        (0, 0, 64, 64), (128, 64, 170, 120), (0, 90, 54, 120)
    ]  # fmt: skip
    properties = [one["properties"] for one in found["features"]]
    assert [one["measurements"] for one in properties] == [{"tumour": 0.0}, {"tumour": 1.0}, {"tumour": 0.5}]
    assert {one["objectType"] for one in properties} == {"tile"}
    assert properties[0]["color"] == [68, 1, 84] and properties[1]["color"] == [253, 231, 37]  # viridis' ends
    assert len(read_geojson(path)) == 3


@pytest.mark.parametrize("origin", [(0, 0), (37, 51)])
def test_regions_are_the_union_of_patches(origin: tuple[int, int]) -> None:
    coords = lattice(20, 15, 64, origin)
    coords = coords[RNG.random(len(coords)) < 0.8]
    values = RNG.random(len(coords))
    heat = heat_map(values, coords, 64, (1200, 900))
    found = regions(heat, 0.6, SCALE, "v", mpp=0.5)
    ours = shapely.union_all([shape(one["geometry"]) for one in found])
    squares = [shapely.box(x, y, x + 64, y + 64) for x, y in coords[values >= 0.6]]
    theirs = shapely.union_all(squares) & shapely.box(0, 0, 1200, 900)
    assert ours.symmetric_difference(theirs).area < 1e-6 * theirs.area
    measured = [one["properties"]["measurements"] for one in found]
    areas = [one["area mm^2"] for one in measured]
    assert sum(areas) == pytest.approx(theirs.area * 0.25e-6) and areas == sorted(areas, reverse=True)
    assert all(0.6 <= one["v: mean"] <= one["v: max"] <= 1 for one in measured)
    largest = shape(found[0]["geometry"])
    inside = values[shapely.area(shapely.intersection(shapely.box(*coords.T, *(coords.T + 64)), largest)) > 1]
    assert measured[0]["v: mean"] == pytest.approx(np.mean(inside))
    least = areas[len(areas) // 2]
    assert len(regions(heat, 0.6, SCALE, "v", mpp=0.5, min_area=least)) == sum(area >= least for area in areas)


def test_no_region_above_everything(tmp_path: Path) -> None:
    heat = heat_map(np.zeros(4), lattice(2, 2, 64), 64, (128, 128))
    assert regions(heat, 0.1, SCALE, "v", mpp=0.5) == []
    write_features(tmp_path / "none.geojson", [])
    assert json.loads((tmp_path / "none.geojson").read_text())["features"] == []


def test_thresholds() -> None:
    values = np.array([0.0, 1, 2, 3, 4, np.nan])
    assert threshold_of(values) is None and threshold_of(values, value=1.5) == 1.5
    assert threshold_of(values, percentile=75) == 3
    with pytest.raises(SlideError, match="give one of both"):
        threshold_of(values, value=1, percentile=2)
    with pytest.raises(SlideError, match="0 to 100"):
        threshold_of(values, percentile=101)
