"""Plans: where the tissue is, by the truth of the toys and by users' own masks; kept on disk without loss."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import shapely
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely.geometry import box, mapping

from slides.errors import SlideError
from slides.open import open_slide
from slides.plan import Plan, make_plan, plan_at
from slides.request import Request
from tests.slides.runs import REQUEST
from tests.slides.toys import Toy, break_header, toy_slide

SQUARE = box(200, 100, 456, 356)  # level-0 pixels


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return toy_slide(tmp_path_factory.mktemp("plan") / "t.svs", 1000, 800)


def plan_of(path: Path, request: Request) -> Plan:
    with open_slide(path) as slide:
        return make_plan(slide, path.stem, request)[0]


def same(one: Plan, two: Plan) -> bool:
    arrays = ("coords", "coverage")
    plain = [field.name for field in fields(Plan) if field.name not in arrays]
    return all(repr(getattr(one, name)) == repr(getattr(two, name)) for name in plain) and all(
        np.array_equal(getattr(one, name), getattr(two, name), equal_nan=True) for name in arrays
    )


def test_patches_lie_where_the_tissue_is(tmp_path: Path) -> None:
    toy = toy_slide(tmp_path / "t.svs", 1000, 800, mpp=2.0)  # large beside the 0.06 mm that are closed
    plan = plan_of(toy.path, replace(REQUEST, size=32, mpp=4.0))
    side = int(plan.geometry.side)
    truth = {
        (x, y): toy.tissue[y : y + side, x : x + side].sum() / side**2
        for y in range(0, 800, side)
        for x in range(0, 1000, side)
    }
    chosen = {tuple(place) for place in plan.coords.tolist()}
    assert {place for place, share in truth.items() if share > 0.4} <= chosen
    assert not {place for place, share in truth.items() if share < 0.05} & chosen
    found = np.array([truth[tuple(place)] for place in plan.coords.tolist()])
    assert np.abs(plan.coverage - found).mean() < 0.06
    assert plan.facts["tissue"] == pytest.approx(toy.tissue.mean(), abs=0.03)
    # In reading order: row by row in strips of many columns.
    assert plan.coords.tolist() == sorted(plan.coords.tolist(), key=lambda place: (place[1], place[0]))


def test_without_tissue_detection_every_square_is_there(toy: Toy) -> None:
    plan = plan_of(toy.path, Request(size=64, mpp=0.5, tissue="none", remove=(), coverage=0.0, tissue_mpp=2.0))
    assert len(plan) == 8 * 7 and len(np.unique(plan.coords, axis=0)) == 56
    last = plan.coverage[(plan.coords == [896, 768]).all(axis=1)][0]
    assert last == pytest.approx((104 / 128) * (32 / 128), abs=0.01)  # what sticks out is no tissue


def test_what_is_saved_comes_back(toy: Toy, tmp_path: Path) -> None:
    plan = plan_of(toy.path, REQUEST)
    plan.save(tmp_path / "plan.npz")
    back = Plan.load(tmp_path / "plan.npz")
    assert back is not None and same(plan, back)
    assert Plan.load(tmp_path / "absent.npz") is None
    with open_slide(toy.path) as slide:
        given_places = plan_at(slide, "t", Request(size=64), plan.coords, plan.geometry.side)
    given_places.save(tmp_path / "given.npz")
    back = Plan.load(tmp_path / "given.npz")
    assert back is not None and same(given_places, back)


def test_a_damaged_plan_is_none(toy: Toy, tmp_path: Path) -> None:
    path = tmp_path / "plan.npz"
    plan = plan_of(toy.path, Request(size=256, mpp=0.5, tissue="none", remove=()))
    plan.save(path)
    raw = path.read_bytes()
    for place in range(0, len(raw), 97):
        path.write_bytes(raw[:place])
        assert Plan.load(path) is None
    for place in range(0, len(raw), 23):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 0xFF]) + raw[place + 1 :])
        back = Plan.load(path)  # zip has checksums of what it holds, and none of some words of its own
        assert back is None or same(back, plan)


@given(
    mpp=st.floats(0.2, 0.6),
    wanted=st.floats(0.2, 2.2),
    size=st.sampled_from([32, 50, 64]),
    overlap=st.sampled_from([0, 13]),
)
@settings(max_examples=60, deadline=None)
def test_a_plan_at_our_own_places_reads_what_ours_reads(
    toy: Toy, mpp: float, wanted: float, size: int, overlap: int
) -> None:
    with open_slide(toy.path, mpp=mpp) as slide:
        request = Request(
            size=size, mpp=wanted, overlap=overlap, upsample=True, tissue="none", remove=(), tissue_mpp=64 * mpp
        )
        ours, _ = make_plan(slide, "t", request)
        again = plan_at(slide, "t", request, ours.coords, ours.geometry.side)
    assert np.array_equal(again.coords, ours.coords)
    a, b = ours.geometry, again.geometry
    assert (a.level, a.read, a.reduce, a.side, a.size) == (b.level, b.read, b.reduce, b.side, b.size)


def test_places_off_the_level_s_pixels_are_read_at_level_0(toy: Toy) -> None:
    with open_slide(toy.path) as slide:
        plan = plan_at(slide, "t", Request(size=64), np.array([[8, 8], [263, 9]]), 256.0)
        on = plan_at(slide, "t", Request(size=64), np.array([[8, 8], [264, 8]]), 256.0)
    assert (plan.geometry.level, plan.geometry.read, plan.geometry.mpp) == (0, 256, 1.0)
    assert on.geometry.level == 1 and plan.settings != on.settings


@pytest.mark.parametrize("place", [[1000, 0], [0, 800], [-64, 0], [10**9, 10**9]])
def test_places_of_another_slide_are_refused(toy: Toy, place: list[int]) -> None:
    with open_slide(toy.path) as slide, pytest.raises(SlideError, match=r"outside its 1000 x 800 pixels"):
        plan_at(slide, "t", Request(size=64), np.array([[0, 0], place]), 64.0)


def geojson(path: Path, **named: shapely.Geometry) -> None:
    features = [
        {"type": "Feature", "geometry": mapping(shape), "properties": {"classification": {"name": name}}}
        for name, shape in named.items()
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def inside(plan: Plan, area: shapely.Geometry, share: float) -> None:
    """Exactly the squares of the grid of which the area has this share, those within 3 % of it left open."""
    side = plan.geometry.side
    squares = {(x, y): box(x, y, x + side, y + side) for x in range(0, 1000, 64) for y in range(0, 800, 64)}
    shares = {place: square.intersection(area).area / side**2 for place, square in squares.items()}
    chosen = {tuple(place) for place in plan.coords.tolist()}
    assert chosen and {place for place, s in shares.items() if s > share + 0.03} <= chosen
    assert not {place for place, s in shares.items() if s < share - 0.03} & chosen


@pytest.fixture
def own(tmp_path: Path) -> Request:
    return Request(size=64, mpp=0.25, masks=str(tmp_path), coverage=0.5, remove=(), tissue_mpp=2.0)


def test_the_user_s_geojson_is_the_tissue(toy: Toy, own: Request, tmp_path: Path) -> None:
    hole = box(300, 200, 364, 264)
    geojson(tmp_path / "t.geojson", Tumour=SQUARE, Stroma=box(600, 400, 900, 700), Pen=hole)
    both = SQUARE.union(box(600, 400, 900, 700))
    inside(plan_of(toy.path, own), both, 0.5)
    inside(plan_of(toy.path, replace(own, classes=("Tumour",))), SQUARE, 0.5)
    # A pair of strings is no set of letters: "Tum" is no class of it.
    inside(plan_of(toy.path, replace(own, exclude=("Pen",))), both.difference(hole), 0.5)
    inside(plan_of(toy.path, replace(own, classes=("Tumour",), exclude=("Pen",))), SQUARE.difference(hole), 0.5)


def test_the_user_s_png_is_the_tissue(toy: Toy, own: Request, tmp_path: Path) -> None:
    mask = np.zeros((100, 125), np.uint8)  # an eighth of the slide
    mask[20:60, 40:90] = 1
    cv2.imwrite(str(tmp_path / "t.png"), mask)
    inside(plan_of(toy.path, own), box(320, 160, 720, 480), 0.5)


def test_a_missing_or_broken_mask_is_one_line(toy: Toy, own: Request, tmp_path: Path) -> None:
    with pytest.raises(SlideError, match=r"^t: no mask in .*looked for t\.geojson, \.json, \.png"):
        plan_of(toy.path, own)
    (tmp_path / "t.geojson").write_text('{"type": "Feature')
    with pytest.raises(SlideError, match=r"t\.geojson"):
        plan_of(toy.path, own)


def test_tiles_that_cannot_be_decoded_are_planned_not_taken_for_glass(tmp_path: Path) -> None:
    toy = toy_slide(tmp_path / "t.svs", 1000, 800, downsamples=(1,))
    plan = plan_of(break_header(toy.path, column=3, row=0), replace(REQUEST, mpp=0.25, size=256))  # glass
    assert [768, 0] in plan.coords.tolist() and plan.facts["broken_tiles"] == 1


def test_the_black_padding_of_border_tiles_is_no_tissue(tmp_path: Path) -> None:
    glass = np.full((500, 600, 3), 244, np.uint8)
    options = {"tile": (256, 256), "photometric": "rgb", "resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"}
    for compression in (None, "jpeg"):  # tifffile pads with zeros
        tifffile.imwrite(tmp_path / "t.tiff", glass, compression=compression, **options)
        assert len(plan_of(tmp_path / "t.tiff", replace(REQUEST, mpp=None, tissue_mpp=4.0))) == 0
        assert len(plan_of(tmp_path / "t.tiff", replace(REQUEST, mpp=None))) == 0
