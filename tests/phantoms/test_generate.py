"""A phantom is a function of kind, seed and index alone; its class can be seen; patients share what patients share."""

from __future__ import annotations

import subprocess
import sys

import cv2
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medclip.phantoms.generate import CLASSES, generate
from medclip.phantoms.phantom import KINDS, Phantom
from medclip.types import UserError


def same(a: Phantom, b: Phantom) -> bool:
    masks = a.masks.keys() == b.masks.keys() and all(np.array_equal(a.masks[k], b.masks[k]) for k in a.masks)
    facts = (p.label == q.label and p.attributes == q.attributes and p.captions == q.captions for p, q in [(a, b)])
    return np.array_equal(a.image, b.image) and all(facts) and a.boxes == b.boxes and a.patient == b.patient and masks


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_arguments_give_the_same_bytes_however_they_are_batched(kind: str) -> None:
    whole = generate(kind, 5, range(12), 80, masks=True)
    assert all(map(same, whole, generate(kind, 5, range(12), 80, masks=True)))
    shuffled = np.random.default_rng(0).permutation(12).tolist()
    for index, phantom in zip(shuffled, generate(kind, 5, shuffled, 80, masks=True), strict=True):
        assert phantom.index == index and same(phantom, whole[index])
    alone = [generate(kind, 5, [index], 80, masks=True)[0] for index in (11, 3)]
    assert same(alone[0], whole[11]) and same(alone[1], whole[3])


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_a_request_that_changes_nothing_else(kind: str) -> None:
    for plain, masked in zip(generate(kind, 1, range(6), 80), generate(kind, 1, range(6), 80, masks=True), strict=True):
        assert not plain.masks and masked.masks
        assert np.array_equal(plain.image, masked.image) and plain.boxes == masked.boxes


def test_another_process_draws_the_same() -> None:
    program = (
        "import sys; from medclip.phantoms.generate import generate\n"
        "for kind in ('histology', 'xray'):\n"
        "    for p in generate(kind, 2, range(3), 96): sys.stdout.buffer.write(p.image.tobytes())"
    )
    there = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout
    here = b"".join(p.image.tobytes() for kind in KINDS for p in generate(kind, 2, range(3), 96))
    assert there == here


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_and_indices_give_other_pictures(kind: str) -> None:
    pictures = [p.image for seed in (0, 1) for p in generate(kind, seed, range(8), 64)]
    for i, a in enumerate(pictures):
        for b in pictures[:i]:
            assert np.abs(a.astype(int) - b).mean() > 2
    names = [{p.patient for p in generate(k, seed, range(8), 64)} for k in KINDS for seed in (0, 1)]
    assert len(set.union(*names)) == sum(map(len, names))  # sets of several seeds and kinds can be mixed


@pytest.mark.parametrize("kind", KINDS)
def test_another_size_shows_the_same_scene(kind: str) -> None:
    for small, large in zip(generate(kind, 9, range(16), 96), generate(kind, 9, range(16), 288), strict=True):
        drop = {"mpp"}  # micrometres a pixel
        facts = [{k: v for k, v in p.attributes.items() if k not in drop} for p in (small, large)]
        assert facts[0] == facts[1] and small.captions == large.captions and small.label == large.label
        shrunk = cv2.resize(large.image, (96, 96), interpolation=cv2.INTER_AREA)
        grey = [cv2.GaussianBlur(image.mean(-1), (0, 0), 1.0) for image in (small.image, shrunk)]
        assert np.corrcoef(grey[0].ravel(), grey[1].ravel())[0, 1] > 0.9
        here = [(name, *(3 * c for c in corners)) for name, *corners in small.boxes]
        for name, *box in large.boxes:
            if min(box[2] - box[0], box[3] - box[1]) > 15:
                assert any(name == other and np.abs(np.subtract(box, at)).max() <= 9 for other, *at in here)
        if large.attributes.get("mpp"):
            assert small.attributes["mpp"] == pytest.approx(3 * large.attributes["mpp"])


@pytest.mark.parametrize("kind", KINDS)
def test_patients_are_runs_of_images(kind: str) -> None:
    phantoms = generate(kind, 0, range(12), 64, per_patient=3)
    assert [p.patient for p in phantoms] == [phantoms[3 * (i // 3)].patient for i in range(12)]
    assert len({p.patient for p in phantoms}) == 4


def test_images_of_a_patient_share_scanner_and_stain() -> None:
    phantoms = generate("histology", 3, range(80), 64)
    per_patient: dict[str, set[tuple[str, str]]] = {}
    for p in phantoms:
        per_patient.setdefault(p.patient, set()).add((p.attributes["scanner"], p.attributes["stain"]))
    assert all(len(found) == 1 for found in per_patient.values())
    assert len(set.union(*per_patient.values())) > 5
    assert len({p.label for p in phantoms[:4]} | {p.label for p in phantoms[4:8]}) > 1


def test_images_of_a_patient_share_the_body() -> None:
    phantoms = [p for p in generate("xray", 4, range(240), 64, per_patient=8)]
    plain = [p for p in phantoms if p.label in ("no finding", "lung nodule") and p.attributes["view"] == "PA"]
    ratios: dict[str, set[float]] = {}
    for p in plain:
        ratios.setdefault(p.patient, set()).add(p.attributes["cardiothoracic_ratio"])
    assert all(len(found) == 1 for found in ratios.values()) and len(set.union(*ratios.values())) == len(ratios) > 15
    grey = np.stack([cv2.GaussianBlur(p.image[8:, 6:-6, 0], (0, 0), 2.0).astype(float).ravel() for p in plain])
    gaps = np.abs(grey[:, None] - grey[None]).mean(-1)
    own = np.asarray([[a.patient == b.patient for b in plain] for a in plain])
    assert gaps[own & ~np.eye(len(plain), dtype=bool)].mean() < 0.75 * gaps[~own].mean()


@pytest.mark.parametrize("kind", KINDS)
def test_classes_are_drawn_evenly(kind: str) -> None:
    labels = [p.label for p in generate(kind, 0, range(270), 64)]
    expected = len(labels) / len(CLASSES[kind])
    counts = np.asarray([labels.count(label) for label in CLASSES[kind]])
    assert counts.sum() == len(labels) and (np.abs(counts - expected) < 4.5 * np.sqrt(expected)).all()


def statistics(image: np.ndarray) -> np.ndarray:
    """Colour and texture by hand: quantiles, and what is left of them at coarser scales, in four quarters."""
    od = -np.log10((image.astype(np.float32) + 1) / 256)
    values = [np.quantile(od, (0.05, 0.25, 0.5, 0.75, 0.95), axis=(0, 1)).ravel(), np.corrcoef(od.reshape(-1, 3).T)[0]]
    for sigma in (1.0, 3.0):
        smoothed = cv2.GaussianBlur(od, (0, 0), sigma)
        slope = np.hypot(*np.gradient(smoothed.mean(-1)))
        values += [smoothed.std((0, 1)), [slope.mean(), np.quantile(slope, 0.95)]]
    return np.concatenate(values)


def test_tissue_can_be_told_by_colour_and_texture() -> None:
    phantoms = generate("histology", 21, range(520), 96)
    features, labels = np.stack([statistics(p.image) for p in phantoms]), np.asarray([p.label for p in phantoms])
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=100))
    accuracy = probe.fit(features[:360], labels[:360]).score(features[360:], labels[360:])
    assert accuracy > 0.8  # chance is 1 in 9; blur, pen and bubbles are among them


def test_findings_can_be_told_by_a_coarse_picture() -> None:
    phantoms = generate("xray", 22, range(900), 64)
    coarse = [cv2.resize(p.image[..., 0], (24, 24), interpolation=cv2.INTER_AREA) for p in phantoms]
    features = np.stack(coarse).reshape(len(coarse), -1).astype(np.float32)
    features -= features.mean(1, keepdims=True)
    labels = np.asarray([p.label for p in phantoms])
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=100, C=0.003))
    accuracy = probe.fit(features[:700], labels[:700]).score(features[700:], labels[700:])
    assert accuracy > 0.6  # chance is 1 in 6; a small nodule is a pixel or two here


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ct", 0, [0]), "unknown phantom kind 'ct': choose one of histology, xray"),
        (("xray", 0, [0], 32), "phantom size 32 is not possible: choose 64 to 1024"),
        (("histology", 0, [0], 5000), "phantom size 5000"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(arguments: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        generate(*arguments)
    assert "\n" not in str(caught.value)
