from __future__ import annotations

import json
from pathlib import Path

import geopandas
import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.ndimage import gaussian_filter

from slides.errors import SlideError
from slides.geojson import geometries, mask_to_geojson, polygons, read_geojson, write_geojson
from slides.mask import Mask, from_geometries

BOX = {"type": "Polygon", "coordinates": [[[0, 0], [10, 0], [10, 10], [0, 10], [0, 0]]]}


def feature(geometry: object = BOX, **properties: object) -> dict:
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def blobs(shape: tuple[int, int] = (300, 400), seed: int = 0) -> np.ndarray:
    """Smooth random tissue with holes and islands."""
    return gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 9) > 0.01


def iou(one: np.ndarray, two: np.ndarray) -> float:
    return (one & two).sum() / (one | two).sum()


@settings(deadline=None, max_examples=200)
@given(arrays(np.bool_, st.tuples(st.integers(1, 9), st.integers(1, 9))), st.floats(0.5, 70))
def test_outlines_have_the_masks_area_and_give_it_back(array: np.ndarray, downsample: float) -> None:
    """Any mask at all: holes, islands in holes, corners that touch."""
    mask = Mask(array, downsample)
    found = polygons(mask)
    assert all(part.is_valid for part in found)
    assert sum(part.area for part in found) == pytest.approx(mask.area)
    size0 = (round(array.shape[1] * downsample), round(array.shape[0] * downsample))
    back = from_geometries(found, size0, downsample)
    np.testing.assert_array_equal(
        back.array[: array.shape[0], : array.shape[1]], array[: back.array.shape[0], : back.array.shape[1]]
    )


def test_what_is_written_is_what_geopandas_and_shapely_read(tmp_path: Path) -> None:
    mask = Mask(blobs(), 16.0)
    path = tmp_path / "slide 1 é.geojson"
    write_geojson(path, mask_to_geojson(mask, color=(200, 0, 0), name="Tumor"))
    frame = geopandas.read_file(path)
    assert sorted(frame["tissue_id"]) == list(range(len(frame))) and len(frame) > 3
    assert set(frame["objectType"]) == {"annotation"}
    assert frame["classification"].iloc[0] == {"name": "Tumor", "color": [200, 0, 0]}
    assert frame.geometry.is_valid.all()
    assert shapely.area(list(frame.geometry)).sum() == pytest.approx(mask.area, rel=0.005)
    shapes = [shapely.geometry.shape(row["geometry"]) for row in json.loads(path.read_text())["features"]]
    for source in (list(frame.geometry), shapes, geometries(path), geometries(frame, classes=["Tumor"])):
        assert iou(from_geometries(source, (6400, 4800), 16.0).array, mask.array) > 0.98
    assert [name for _, name in read_geojson(path)] == ["Tumor"] * len(frame)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_simplifying_keeps_to_its_tolerance_and_saves_points() -> None:
    mask = Mask(blobs(), 8.0)
    exact, simple = polygons(mask), polygons(mask, simplify=8.0)
    points = [sum(len(shapely.get_coordinates(part)) for part in parts) for parts in (exact, simple)]
    assert points[1] < points[0] / 2
    assert shapely.hausdorff_distance(shapely.union_all(exact), shapely.union_all(simple)) <= 8.0 + 1e-9


def test_small_parts_and_small_holes_go() -> None:
    array = np.zeros((40, 60), bool)
    array[5:35, 5:35] = True
    array[10:12, 10:12] = False  # 4 pixels
    array[20:28, 20:28] = False  # 64
    array[3:5, 50:52] = True  # 4
    (part,) = polygons(Mask(array, 2.0), min_area=10 * 4)
    assert part.area == (900 - 64) * 4 and len(part.interiors) == 1


def test_an_empty_mask_is_an_empty_collection(tmp_path: Path) -> None:
    path = tmp_path / "none.geojson"
    write_geojson(path, mask_to_geojson(Mask(np.zeros((5, 5), bool), 4.0)))
    assert json.loads(path.read_text()) == {"type": "FeatureCollection", "features": []}
    assert geometries(path) == []


def test_exteriors_run_as_rfc_7946_has_it() -> None:
    array = np.ones((9, 9), bool)
    array[4, 4] = False
    (row,) = mask_to_geojson(Mask(array, 1.0))["features"]
    exterior, hole = (shapely.LinearRing(ring) for ring in row["geometry"]["coordinates"])
    assert exterior.is_ccw and not hole.is_ccw


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken.geojson").mkdir()
    with pytest.raises(SlideError, match=r"cannot write .*taken\.geojson"):
        write_geojson(tmp_path / "taken.geojson", {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken.geojson"]


# What QuPath exports

EXPORTS = {
    "collection": {
        "type": "FeatureCollection",
        "features": [feature(classification={"name": "Tumor", "color": [1, 2, 3]})],
    },
    "list": [feature(objectType="annotation", classification={"name": "Tumor", "colorRGB": -3670016})],
    "single": feature(name="Tumor", isLocked=False),
    "derived": [feature(classification={"names": ["Tumor"], "color": [200, 0, 0]})],
    "nested": [feature({"type": "GeometryCollection", "geometries": [BOX]}, classification="Tumor")],
}


@pytest.mark.parametrize("name", EXPORTS)
def test_every_form_of_export(tmp_path: Path, name: str) -> None:
    path = tmp_path / "export.geojson"
    path.write_text(json.dumps(EXPORTS[name]))
    ((geometry, found),) = read_geojson(path)
    assert (geometry.area, found) == (100, "Tumor")


def test_bare_geometries_and_features_without_one(tmp_path: Path) -> None:
    path = tmp_path / "bare.json"
    path.write_text(
        json.dumps({"type": "GeometryCollection", "geometries": [BOX, {"type": "Point", "coordinates": [1, 2]}]})
    )
    assert [part.area for part in geometries(path)] == [100]
    path.write_text(json.dumps([feature(None), feature(), feature(classification=None)]))
    assert [name for _, name in read_geojson(path)] == ["", ""]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "cannot be read as GeoJSON"),
        ("", "cannot be read as GeoJSON"),
        ("[" * 100_000, "cannot be read as GeoJSON"),
        ('"text"', "is JSON but not GeoJSON"),
        ('{"type": "FeatureCollection"}', "is JSON but not GeoJSON"),
        ('{"type": "Topology"}', "feature 1 of 1 is broken .*'Topology' is no kind of geometry"),
        (json.dumps([feature(), {"type": "Feature", "geometry": {"type": "Circle"}}]), "feature 2 of 2 .*'Circle'"),
        (json.dumps([feature({"type": "Polygon"})]), "feature 1 of 1"),
        (json.dumps([feature({"type": "Polygon", "coordinates": [[[0, 0], [1, 1]]]})]), "feature 1 of 1"),
        (json.dumps([feature({"type": "Polygon", "coordinates": [[["a", 0], [1, 1], [1, 2]]]})]), "feature 1 of 1"),
        (
            json.dumps([feature({"type": "Polygon", "coordinates": [[[0, 0], [float("nan"), 1], [1, 2], [0, 0]]]})]),
            "feature 1",
        ),
        (json.dumps([7]), "feature 1 of 1 is broken .it is no JSON object"),
        (json.dumps([{"type": "Feature", "geometry": BOX, "properties": [1]}]), "feature 1 of 1"),
    ],
)
def test_broken_files_get_one_line(tmp_path: Path, content: str, match: str) -> None:
    path = tmp_path / "bad.geojson"
    path.write_text(content)
    with pytest.raises(SlideError, match=rf"bad\.geojson: .*{match}|bad\.geojson: {match}") as caught:
        read_geojson(path)
    assert "\n" not in str(caught.value)


def test_size_limit(tmp_path: Path) -> None:
    path = tmp_path / "large.geojson"
    path.write_text(json.dumps(feature()))
    with pytest.raises(SlideError, match="the limit is"):
        read_geojson(path, max_bytes=20)


# Classes


def square(x: int, name: str) -> dict:
    ring = [[x, 0], [x + 10, 0], [x + 10, 10], [x, 10], [x, 0]]
    return feature({"type": "Polygon", "coordinates": [ring]}, classification={"name": name} if name else None)


def area(source: object, **options: object) -> float:
    return shapely.union_all(geometries(source, **options)).area  # pyright: ignore


def test_classes_are_kept_and_artefacts_cut_out(tmp_path: Path) -> None:
    path = tmp_path / "classes.geojson"
    path.write_text(json.dumps([square(0, "Tumor"), square(20, "Stroma"), square(5, "Artefact"), square(40, "")]))
    assert area(path) == 350
    assert area(path, classes=["Tumor"]) == 100
    assert area(path, exclude=["Artefact"]) == 50 + 100 + 100
    assert area(str(path), classes=["Tumor", "Stroma"], exclude=["Artefact"]) == 150
    assert area(path, classes=["Necrosis"]) == 0
    frame = geopandas.GeoDataFrame.from_features(json.loads(path.read_text()))
    assert area(frame, classes=["Tumor"], exclude=["Artefact"]) == 50
    assert area(frame.geometry) == 350
    frame["classification"] = [json.dumps(value) for value in frame["classification"]]  # as older geopandas reads it
    assert area(frame, classes=["Tumor"], exclude=["Artefact"]) == 50
    assert area([part for part, _ in read_geojson(path)]) == 350


def test_asking_for_classes_where_there_are_none(tmp_path: Path) -> None:
    path = tmp_path / "plain.geojson"
    path.write_text(json.dumps([square(0, "")]))
    with pytest.raises(SlideError, match=r"plain\.geojson: no annotation has a class"):
        geometries(path, classes=["Tumor"])
