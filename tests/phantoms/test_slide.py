"""Slide phantoms: the truth that they state is what their pixels show."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from medclip.phantoms.captions import facts_stated
from medclip.phantoms.histology import CLASSES
from medclip.phantoms.slide import GLASS, LABELS, SlidePhantom, slide_phantom
from medclip.types import UserError

SMALL = (1536, 1024)


def paint(slide: SlidePhantom, downsample: int = 1) -> np.ndarray:
    """The whole slide at one level, put together from its tiles."""
    tile = slide.painter((1, downsample) if downsample > 1 else (1,))
    level, (width, height) = int(downsample > 1), (side // downsample for side in slide.size)
    rows = [np.hstack([tile(level, c, r) for c in range(-(-width // 256))]) for r in range(-(-height // 256))]
    return np.vstack(rows)[:height, :width]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 500), st.sampled_from([(4000, 3000), (3000, 9000), (700, 600)]))
def test_regions_divide_the_tissue(seed: int, index: int, size: tuple[int, int]) -> None:
    slide = slide_phantom(seed, index, size)
    regions = dict(slide.regions())
    assert set(regions) <= set(CLASSES) and slide.label in LABELS and slide.label in regions
    tissue = slide.tissue()
    assert sum(area.area for area in regions.values()) == pytest.approx(tissue.area, rel=1e-6)  # disjoint, none left
    assert shapely.union_all(list(regions.values())).symmetric_difference(tissue).area < 1e-6 * tissue.area
    assert shapely.box(0, 0, *size).covers(tissue)
    assert 0.1 < tissue.area / (size[0] * size[1]) < 0.75
    assert all(polygon.is_valid and not polygon.interiors for _, polygon in slide.layers)
    malignant = {"adenocarcinoma", "squamous cell carcinoma"} & set(regions)
    assert malignant == ({slide.label} if slide.label != "benign glandular epithelium" else set())


def test_the_class_of_a_point_is_its_regions() -> None:
    slide = slide_phantom(3, 4, SMALL)
    points = np.random.default_rng(0).uniform((-50, -50), (SMALL[0] + 50, SMALL[1] + 50), (600, 2))
    found = slide.classes_at(points)
    for point, name in zip(points, found, strict=True):
        inside = {label for label, area in slide.regions() if area.contains(shapely.Point(point))}
        assert inside == ({name} if name != GLASS else set())
    assert len(set(found)) > 3 and GLASS in found


def test_pixels_show_the_regions() -> None:
    """Along every border of the truth, tissue begins where the polygon does, to within a pixel."""
    slide = slide_phantom(5, 0, SMALL, pen=False)
    pixels = paint(slide).astype(int)
    y, x = np.mgrid[: SMALL[1], : SMALL[0]]
    inside = shapely.contains_xy(slide.tissue(), x.ravel() + 0.5, y.ravel() + 0.5).reshape(x.shape)
    glass = np.median(pixels[~inside], 0)
    assert np.abs(pixels - glass).max(-1)[~inside].max() > 0  # the scanner's noise
    far = np.abs(pixels - glass).max(-1) > 25
    row, column = np.argwhere(far & ~inside).T
    away = shapely.distance(slide.tissue().boundary, shapely.points(column + 0.5, row + 0.5))
    assert len(row) and away.max() < 0.75  # nothing but the border's own pixels
    for label, area in slide.regions():
        core = area.buffer(-20)
        if label not in ("adipose tissue", "mucin") and core.area > 5000:
            within = shapely.contains_xy(core, x.ravel() + 0.5, y.ravel() + 0.5).reshape(x.shape)
            assert far[within].mean() > 0.6, label


@pytest.mark.parametrize("downsample", [2, 4, 16])
def test_levels_agree(downsample: int) -> None:
    slide = slide_phantom(5, 3, SMALL, pen=True)
    full, low = paint(slide), paint(slide, downsample)
    h, w = low.shape[:2]
    means = full[: h * downsample, : w * downsample].reshape(h, downsample, w, downsample, 3).mean((1, 3))
    off = np.abs(low - means).max(-1)
    # a tile of uniform class is the mean, rounded; where classes meet, means are blended, not pixels
    assert np.percentile(off, 80) <= 0.6
    y, x = np.argwhere(off > 2).T
    assert slide.pen is not None
    border = shapely.union_all([*(polygon.boundary for _, polygon in slide.layers), slide.pen.boundary])
    near = shapely.distance(border, shapely.points((x + 0.5) * downsample, (y + 0.5) * downsample))
    assert len(x) and near.max() < 1.5 * downsample


def test_tiles_are_the_same_in_any_order_and_nearly_so_in_any_size() -> None:
    whole = paint(slide_phantom(2, 7, SMALL))
    small, large = (slide_phantom(2, 7, SMALL).painter((1, 4), side) for side in (256, 512))
    for column, row in ((5, 3), (0, 0), (2, 1)):
        part = whole[row * 256 : (row + 1) * 256, column * 256 : (column + 1) * 256]
        assert np.array_equal(small(0, column, row), part)
    differs = (large(0, 1, 1) != whole[512:1024, 512:1024]).any(-1)
    assert differs.mean() < 1e-3  # rounding of an outline's corners
    assert not np.array_equal(paint(slide_phantom(2, 8, SMALL)), whole)


def test_neighbouring_fields_do_not_show_a_step() -> None:
    """The blend's weights add up to one everywhere: on glass, where nothing else varies, the mean is flat."""
    slide = slide_phantom(1, 0, SMALL, mpp=1.0)
    glass = np.concatenate([slide.painter()(0, c, 40) for c in range(8)], 1).astype(float)  # far below the tissue
    columns = glass.mean((0, 2))
    assert np.ptp(columns) < 3 and glass.std() > 0.3  # a weight of 17/16 or 15/16 would be 15 grey levels


def test_patients_share_a_stain_and_slides_do_not_share_a_layout() -> None:
    slides = [slide_phantom(4, i, slides_per_patient=2) for i in range(12)]
    for one, two in zip(slides[::2], slides[1::2], strict=True):
        assert one.patient == two.patient and one.name != two.name
        assert {k: one.attributes[k] for k in ("stain", "scanner")} == {
            k: two.attributes[k] for k in ("stain", "scanner")
        }
    assert len({s.patient for s in slides}) == 6 and len({s.attributes["scanner"] for s in slides}) > 1
    assert {slide_phantom(4, i).label for i in range(20)} == set(LABELS)
    assert slide_phantom(4, 3, label="adenocarcinoma").label == "adenocarcinoma"


def test_captions_state_the_facts_of_the_place() -> None:
    slide = slide_phantom(6, 2, (4000, 3000), 0.5, pen=True)
    regions, seen = dict(slide.regions()), set()
    places = slide.positions(12, 300)
    assert len(places) == 12 and len(set(places)) == 12 and slide.positions(12, 300) == places
    for x, y, label in places:
        square = shapely.box(x, y, x + 300, y + 300)
        assert regions[label].intersection(square).area >= 0.75 * 300**2
        for caption in slide.captions(x, y, 300):
            facts = facts_stated("histology", caption)
            assert facts["label"] == {label} and facts["magnification"] == {"20x"}
            strength = slide.attributes["stain"]
            assert facts["stain"] == (set() if strength == "regular" else {strength})
            assert slide.pen is not None
            share = slide.pen.intersection(square).area / 300**2
            assert facts["artefact"] == ({"pen"} if share > 0.02 else set())
        seen.add(label)
    assert len(seen) > 2
    assert slide.captions(0, 0, 10) == []
    x, y, _ = places[0]
    assert facts_stated("histology", slide.captions(x, y, 300, mpp=0.9)[0])["magnification"] == {"10x"}


def test_ink_darkens_what_lies_below() -> None:
    clean, inked = (slide_phantom(8, 1, SMALL, pen=pen) for pen in (False, True))
    assert clean.pen is None and inked.pen is not None and clean.layers == inked.layers
    one, two = paint(clean).astype(int), paint(inked).astype(int)
    y, x = np.mgrid[: SMALL[1], : SMALL[0]]
    marked = shapely.contains_xy(inked.pen.buffer(-2), x.ravel() + 0.5, y.ravel() + 0.5).reshape(x.shape)
    clear = ~shapely.contains_xy(inked.pen.buffer(2), x.ravel() + 0.5, y.ravel() + 0.5).reshape(x.shape)
    assert np.array_equal(one[clear], two[clear]) and marked.sum() > 1000
    ratio = two[marked] / np.maximum(one[marked], 1)
    assert np.median(ratio) < 0.7 and (ratio <= 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"size": (100, 4000)}, "not possible"), ({"mpp": 0.0}, "not possible"), ({"label": "flu"}, "choose one of")],
)
def test_what_is_not_possible_is_said_in_one_line(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        slide_phantom(0, 0, **change)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="choose among"):
        slide_phantom(0, 0).painter((1, 64))


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(0, 500),
    st.sampled_from([(2688, 2016), (1000, 900), (900, 3000)]),
    st.sampled_from([0.002, 0.03, 0.2]),
)
def test_a_planted_tumour_has_its_share_and_is_one_region(
    seed: int, index: int, size: tuple[int, int], share: float
) -> None:
    slide = slide_phantom(seed, index, size, label="adenocarcinoma", planted=share)
    regions = dict(slide.regions())
    assert {"adenocarcinoma", "squamous cell carcinoma"} & set(regions) == {"adenocarcinoma"}
    region = regions["adenocarcinoma"]
    # where a piece is narrower than the tumour, its border cuts some of it off
    assert 0.5 * share < region.area / slide.tissue().area <= share * 1.001
    assert region.geom_type == "Polygon"
    if share < 0.1:
        assert region.area / slide.tissue().area == pytest.approx(share, rel=0.1)


def test_all_but_the_planted_tumour_is_the_benign_slide() -> None:
    """Nothing but the region gives the label away: neither ground, nor other regions, stain, or ink."""
    benign = slide_phantom(6, 1, SMALL, label=LABELS[0], pen=True, planted=0.05)
    plain = slide_phantom(6, 1, SMALL, label=LABELS[0], pen=True)
    tumour = slide_phantom(6, 1, SMALL, label="squamous cell carcinoma", pen=True, planted=0.05)
    before, after = paint(benign), paint(tumour)
    assert np.array_equal(before, paint(plain))
    region = dict(tumour.regions())["squamous cell carcinoma"]
    row, column = np.nonzero((before != after).any(-1))
    away = shapely.distance(region, shapely.points(column + 0.5, row + 0.5))
    assert away.max() < 1.5  # the border's own pixels
    assert len(row) > 0.9 * region.area


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(UserError, match=r"0\.001 to 0\.2"):
        slide_phantom(0, 0, planted=share)
