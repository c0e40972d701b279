"""Chest X-rays show their finding where box and mask say, on the named side: each against itself without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pytest

from medclip.phantoms import findings
from medclip.phantoms.anatomy import Body, Chest, build_chest
from medclip.phantoms.findings import HEART_RATIO, SIDED, ZONED, ZONES, Change
from medclip.phantoms.generate import generate
from medclip.phantoms.noise import GRID
from medclip.phantoms.phantom import Phantom, patient_stream

SEED, COUNT, SIZE = 41, 260, 128


@dataclass
class Pair:
    shown: Phantom
    change: np.ndarray  # grey levels that the finding added, (SIZE, SIZE)


def draw() -> list[Phantom]:
    return generate("xray", SEED, range(COUNT), SIZE, per_patient=1, masks=True)


@pytest.fixture(scope="module")
def pairs() -> Iterator[list[Pair]]:
    """Every image beside the same image drawn with a finding that changes nothing but takes the same random numbers."""
    shown = draw()
    patch = pytest.MonkeyPatch()
    for label, original in list(findings.FINDINGS.items()):

        def without(chest: Chest, facts: dict[str, Any], rng: np.random.Generator, original=original) -> Change:
            return Change(original(chest, facts, rng).extent, np.zeros((GRID, GRID), np.float32), 1.0)

        patch.setitem(findings.FINDINGS, label, without)
    hidden = draw()
    patch.undo()
    yield [Pair(a, a.image[..., 0].astype(float) - b.image[..., 0]) for a, b in zip(shown, hidden, strict=True)]


def of(pairs: list[Pair], *labels: str) -> list[Pair]:
    return [pair for pair in pairs if pair.shown.label in labels]


def around(mask: np.ndarray, pixels: int) -> np.ndarray:
    return cv2.dilate(mask.astype(np.uint8), np.ones((2 * pixels + 1,) * 2)) > 0


def test_a_finding_changes_the_image_where_its_mask_is_and_nowhere_else(pairs: list[Pair]) -> None:
    sign = {"pleural effusion": 1, "lung nodule": 1, "lung consolidation": 1, "pneumothorax": -1}
    least = {"pleural effusion": 40, "lung nodule": 25, "lung consolidation": 12, "pneumothorax": 5}
    for label in sign:
        chosen = of(pairs, label)
        assert len(chosen) > 20
        for pair in chosen:
            mask = pair.shown.masks[label]
            assert mask.any() and sign[label] * pair.change[mask].mean() > least[label]
            if label == "pneumothorax":  # the lung beside it is denser, and so a little changed too
                assert np.abs(pair.change[mask]).mean() > 1.5 * np.abs(pair.change[~around(mask, 3)]).mean()
            else:
                assert np.abs(pair.change[~around(mask, 12)]).mean() < 0.5
    for pair in of(pairs, "no finding"):
        assert not pair.change.any() and not pair.shown.boxes


def test_the_box_is_that_of_the_mask(pairs: list[Pair]) -> None:
    for pair in pairs:
        p = pair.shown
        if p.label == "no finding":
            continue
        ((name, x0, y0, x1, y1),) = p.boxes
        rows, columns = np.flatnonzero(p.masks[name].any(1)), np.flatnonzero(p.masks[name].any(0))
        exact = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert name == p.label and [x0, y0, x1, y1] == exact


def test_the_patients_left_is_on_the_images_right(pairs: list[Pair]) -> None:
    sides = set()
    for pair in of(pairs, *SIDED):
        p = pair.shown
        columns = np.nonzero(p.masks[p.label])[1]
        left = p.attributes["side"] == "left"
        sides.add((p.label, left))
        assert (columns >= SIZE / 2 - 1).all() if left else (columns <= SIZE / 2).all()
        energy = np.abs(pair.change).sum(0)
        named, other = (
            (energy[SIZE // 2 :], energy[: SIZE // 2]) if left else (energy[: SIZE // 2], energy[SIZE // 2 :])
        )
        assert named.sum() > 10 * other.sum()
    assert len(sides) == 2 * len(SIDED)
    # the heart's larger part is on the patient's left, whatever the finding
    for pair in pairs:
        columns = np.nonzero(pair.shown.masks["heart"])[1]
        assert (columns > SIZE / 2).mean() > 0.55


def test_the_zone_is_a_third_of_the_lung(pairs: list[Pair]) -> None:
    for pair in of(pairs, *ZONED):
        p = pair.shown
        body = Body.draw(patient_stream("xray", SEED, p.index))
        middle = np.nonzero(p.masks[p.label])[0].mean() / SIZE * 2 - 1
        third = (middle - body.apex) / (body.dome - body.apex) * 3
        assert abs(third - ZONES.index(p.attributes["zone"]) - 0.5) < 0.7


def test_severity_is_size_or_density(pairs: list[Pair]) -> None:
    def over(label: str, severity: str, value: Callable[[Pair], float]) -> np.ndarray:
        return np.asarray([value(p) for p in of(pairs, label) if p.shown.attributes["severity"] == severity])

    def area(pair: Pair) -> float:
        return float(pair.shown.masks[pair.shown.label].mean())

    def strength(pair: Pair) -> float:
        return float(pair.change[pair.shown.masks[pair.shown.label]].mean())

    small, moderate, large = (over("pleural effusion", s, area) for s in ("small", "moderate", "large"))
    assert np.median(small) < 0.6 * np.median(moderate) and np.median(moderate) < 0.75 * np.median(large)
    for label in ("lung nodule", "pneumothorax"):
        assert over(label, "small", area).max() < over(label, "large", area).min()
    faint, dense = (over("lung consolidation", s, strength) for s in ("faint", "dense"))
    assert np.median(faint) < 0.7 * np.median(dense)


def test_the_heart_is_as_wide_as_the_cardiothoracic_ratio_says(pairs: list[Pair]) -> None:
    for pair in pairs:
        p = pair.shown
        body = Body.draw(patient_stream("xray", SEED, p.index))
        columns = np.flatnonzero(p.masks["heart"].any(0))
        measured = (columns[-1] + 1 - columns[0]) / (SIZE * body.width)
        assert measured == pytest.approx(p.attributes["cardiothoracic_ratio"], abs=0.04)
        ratio = p.attributes["cardiothoracic_ratio"] - 0.03 * (p.attributes["view"] == "AP")
        if p.label == "cardiomegaly":
            low, high = HEART_RATIO[p.attributes["severity"]]
            assert low <= ratio <= high
        else:
            assert ratio < 0.5  # the usual limit of a normal heart


def test_lungs_are_dark_the_heart_and_abdomen_bright(pairs: list[Pair]) -> None:
    for pair in of(pairs, "no finding"):
        image, masks = pair.shown.image[..., 0], pair.shown.masks
        lung, heart = image[masks["lung"]].mean(), image[masks["heart"] & ~masks["lung"]].mean()
        assert lung + 60 < heart and lung + 60 < image[-SIZE // 8 :, SIZE // 3 : -SIZE // 3].mean()
        assert lung > 15  # and not black: vessels, ribs
        assert (image == 255).mean() < 0.1
        for side in (masks["lung"][:, : SIZE // 2], masks["lung"][:, SIZE // 2 :]):
            parts, _, stats, _ = cv2.connectedComponentsWithStats(side.astype(np.uint8))
            assert parts == 2 or np.sort(stats[1:, cv2.CC_STAT_AREA])[-2] < 4  # one lung a side, without crumbs


def test_vessels_vanish_in_a_pneumothorax(pairs: list[Pair]) -> None:
    def detail(image: np.ndarray, mask: np.ndarray) -> float:
        return float((image - cv2.GaussianBlur(image, (0, 0), 2.0))[mask].std())

    calmer = []
    for pair in of(pairs, "pneumothorax"):
        core = cv2.erode(pair.shown.masks["pneumothorax"].astype(np.uint8), np.ones((3, 3))) > 0
        if core.sum() > 60:
            image = pair.shown.image[..., 0].astype(np.float32)
            calmer.append(detail(image, core) < detail(image - pair.change.astype(np.float32), core))
    assert len(calmer) > 8 and np.mean(calmer) > 0.9


def test_an_ap_view_shows_a_larger_heart_and_higher_diaphragm() -> None:
    body = Body.draw(patient_stream("xray", 0, 0))
    deep, shallow = build_chest(body, body.heart, 0.0), build_chest(body, body.heart, -0.06)
    assert shallow.lung.sum() < deep.lung.sum()
    same_patient = generate("xray", 0, range(40), 64, per_patient=40, masks=True)
    plain = [p for p in same_patient if p.label != "cardiomegaly"]
    hearts = {v: {p.masks["heart"].any(0).sum() for p in plain if p.attributes["view"] == v} for v in ("AP", "PA")}
    lungs = {v: np.mean([p.masks["lung"].sum() for p in plain if p.attributes["view"] == v]) for v in ("AP", "PA")}
    assert min(hearts["AP"]) > max(hearts["PA"]) and lungs["AP"] < lungs["PA"]


def test_a_marker_lies_in_one_upper_corner() -> None:
    """R on the image's left or L on its right: bright print in one corner and not in the other."""
    left = right = 0
    for p in generate("xray", 3, range(40), 224):
        corners = p.image[:56, :28, 0], p.image[:56, -28:, 0]
        bright = [int((corner >= 230).sum()) for corner in corners]
        assert min(bright) < 4 < max(bright)
        left += bright[0] > bright[1]
        right += bright[1] > bright[0]
    assert min(left, right) > 8


@pytest.mark.parametrize("size", [64, 224])
def test_a_picture_is_grey_and_uses_the_range(size: int) -> None:
    for p in generate("xray", 2, range(4), size):
        assert np.array_equal(p.image[..., 0], p.image[..., 1]) and np.array_equal(p.image[..., 0], p.image[..., 2])
        assert np.quantile(p.image, 0.02) < 40 and np.quantile(p.image, 0.98) > 190
