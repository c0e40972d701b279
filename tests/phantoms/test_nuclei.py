"""The vectorised brush against the one-by-one reference, and cell sizes against histology."""

from __future__ import annotations

import numpy as np
import pytest

from medclip.phantoms.histology import CLASSES, MICRONS, histology_phantom
from medclip.phantoms.nuclei import Nuclei, draw_nuclei, nucleoli, population
from medclip.phantoms.tissue import TISSUES, Plot
from tests.phantoms.reference import draw_one_by_one


def nuclei_of(label: str, um: float, seed: int = 0) -> Nuclei:
    """The nuclei of a field, those inside it."""
    nuclei = TISSUES[label](Plot(np.random.default_rng(seed), um, 96)).nuclei
    return nuclei.take((nuclei.x > 0) & (nuclei.x < um) & (nuclei.y > 0) & (nuclei.y < um))


def one(**changes: float) -> Nuclei:
    columns = {"x": 20, "y": 20, "a": 8, "b": 4, "angle": 0, "density": 0.8, "vesicle": 0, "ripple": 0} | changes
    return Nuclei(**{name: np.asarray([value], np.float32) for name, value in columns.items()})


@pytest.mark.parametrize("label", CLASSES)
def test_the_fast_brush_draws_what_the_slow_one_draws(label: str) -> None:
    for um in MICRONS.values():
        nuclei = TISSUES[label](Plot(np.random.default_rng(1), um, 160)).nuclei
        fast, slow = draw_nuclei(nuclei, um, 160), draw_one_by_one(nuclei, um, 160)
        assert np.abs(fast - slow).max() < 5e-5 < slow.max()  # single against double precision


def test_a_whole_image_is_the_same_with_either_brush() -> None:
    for index in range(12):
        fast, slow = (histology_phantom(7, index, index, 96, draw=draw) for draw in (draw_nuclei, draw_one_by_one))
        assert fast.captions == slow.captions and fast.boxes == slow.boxes
        difference = np.abs(fast.image.astype(int) - slow.image.astype(int))
        assert difference.max() <= 1 and difference.mean() < 0.01


def test_order_does_not_matter() -> None:
    nuclei = nuclei_of("adenocarcinoma", 112.0)
    shuffled = nuclei.take(np.random.default_rng(0).permutation(len(nuclei)))
    assert np.array_equal(draw_nuclei(nuclei, 112.0, 96), draw_nuclei(shuffled, 112.0, 96))


def test_an_ellipse_has_its_area_axes_and_density() -> None:
    drawn = draw_nuclei(one(), 40.0, 400)  # ten pixels a micrometre
    inside = drawn > 0.4
    assert inside.sum() / 100 == pytest.approx(np.pi * 8 * 4, rel=0.01)
    rows, columns = np.nonzero(inside)
    assert np.ptp(columns) / 10 == pytest.approx(16, abs=0.2) and np.ptp(rows) / 10 == pytest.approx(8, abs=0.2)
    assert drawn.max() == pytest.approx(0.8)
    turned = draw_nuclei(one(angle=np.pi / 2), 40.0, 400)
    assert np.abs(turned - drawn.T).max() < 0.02


def test_open_chromatin_is_pale_in_the_middle_and_a_nucleolus_dark() -> None:
    nucleus = one(vesicle=0.5, a=6, b=6)
    drawn = draw_nuclei(nucleus, 40.0, 400)
    assert drawn[200, 200] == pytest.approx(0.4, abs=0.01)  # density * (1 - vesicle)
    assert drawn[200, 200 + 55] > 0.7  # near the membrane
    with_spot = draw_nuclei(Nuclei.join(nucleus, nucleoli(nucleus, 1.5)), 40.0, 400)
    assert with_spot.max() == pytest.approx(1.2)


def test_a_nucleus_outside_the_field_leaves_no_trace_and_one_at_the_edge_is_cut() -> None:
    assert not draw_nuclei(one(x=-30), 40.0, 100).any()
    half = draw_nuclei(one(x=0), 40.0, 400)
    assert (half > 0.4).sum() / 100 == pytest.approx(np.pi * 8 * 4 / 2, rel=0.02)


def test_a_population_has_the_size_and_direction_asked_for() -> None:
    xy = np.zeros((4000, 2))
    cells = population(np.random.default_rng(0), xy, a=5.0, ratio=0.6, spread=0.1, angle=np.full(4000, 0.7), turn=0.1)
    assert np.median(cells.a) == pytest.approx(5.0, rel=0.02)
    assert np.median(cells.b / cells.a) == pytest.approx(0.6, rel=0.02)
    assert cells.angle.mean() == pytest.approx(0.7, abs=0.01) and cells.angle.std() == pytest.approx(0.1, rel=0.1)


def test_size_shape_and_number_of_nuclei_follow_the_class() -> None:
    um = MICRONS["10x"]
    fields = {label: [nuclei_of(label, um, seed) for seed in range(4)] for label in CLASSES}
    density = {label: np.mean([len(n) for n in each]) / (um / 1000) ** 2 for label, each in fields.items()}
    large = {label: np.quantile(np.concatenate([n.a for n in each]), 0.9) for label, each in fields.items()}
    shape = {label: np.median(np.concatenate([n.b / n.a for n in each])) for label, each in fields.items()}
    assert density["lymphoid tissue"] > 15_000  # a square millimetre; a lymph node has tens of thousands
    assert density["lymphoid tissue"] > 2 * density["stroma"] > 0
    assert density["mucin"] < density["adenocarcinoma"] / 4 and density["adipose tissue"] < density["stroma"] * 1.5
    assert large["adenocarcinoma"] > 1.25 * large["benign glandular epithelium"]  # malignant nuclei are larger
    lymphocytes = np.concatenate([n.a for n in fields["lymphoid tissue"]])
    assert 2.8 < np.median(lymphocytes) < 3.8  # half of 6 to 7 um
    for spindle in ("stroma", "smooth muscle", "adipose tissue"):
        assert shape[spindle] < 0.35 < 0.55 < shape["squamous cell carcinoma"]
    spread = {label: np.concatenate([n.a for n in each]).std() / large[label] for label, each in fields.items()}
    assert spread["lymphoid tissue"] < 0.6 * spread["squamous cell carcinoma"]  # monotonous against pleomorphic
