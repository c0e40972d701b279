"""Calibration against torchmetrics, scikit-learn, and cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from scipy.special import softmax
from torchmetrics.functional.classification.calibration_error import _ce_compute

from medclip.evals.calibration import BINS, brier, equal_width_bins, expected_error, probabilities, reliability


def drawn(n: int = 400, classes: int = 5, sharpness: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    logits = sharpness * rng.normal(size=(n, classes))
    return probabilities(logits), np.array([rng.choice(classes, p=row) for row in probabilities(logits / 2)])


def test_expected_error_of_equal_width_is_torchmetrics() -> None:
    probability, labels = drawn()
    sure, right = probability.max(axis=1), (probability.argmax(axis=1) == labels).astype(float)
    borders = torch.linspace(0, 1, BINS + 1, dtype=torch.float64)
    # Its public function rounds everything to single precision before it comes here.
    want = float(_ce_compute(torch.from_numpy(sure), torch.from_numpy(right), borders, norm="l1"))
    assert reliability(probability, labels).ece == pytest.approx(want, abs=1e-12)
    assert 0.05 < want < 0.4


@pytest.mark.parametrize("classes", [2, 5])
def test_brier_is_scikit_learns(classes: int) -> None:
    probability, labels = drawn(classes=classes)
    want = sk.brier_score_loss(labels, probability, labels=range(classes), scale_by_half=False)
    assert brier(probability, labels) == pytest.approx(want, abs=1e-12)


def test_bins_hold_every_sample_once_and_give_the_error_back() -> None:
    probability, labels = drawn()
    found = reliability(probability, labels)
    assert sum(b.count for b in found.bins) == len(labels)
    total = sum(b.count * abs(b.observed - b.predicted) for b in found.bins) / len(labels)
    assert total == pytest.approx(found.ece, abs=1e-12)
    assert sum(b.count * b.observed for b in found.bins) / len(labels) == pytest.approx(found.accuracy)
    assert found.accuracy == np.mean(probability.argmax(1) == labels)
    assert [b.predicted for b in found.bins] == sorted(b.predicted for b in found.bins)


def test_a_border_belongs_to_the_upper_bin_and_one_to_the_last() -> None:
    assert equal_width_bins(np.array([0.0, 0.2, 0.19, 0.4, 1.0]), 5).tolist() == [0, 1, 0, 2, 4]


def test_truth_drawn_from_the_probabilities_is_calibrated_and_sharpening_is_not() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(40_000, 4))
    probability = softmax(logits, axis=1)
    labels = (rng.random((len(logits), 1)) > probability.cumsum(1)).sum(1).clip(max=3)
    honest, sharp = (reliability(softmax(t * logits, axis=1), labels) for t in (1.0, 5.0))
    assert honest.ece < 0.02 and honest.ece_equal_mass < 0.02
    assert sharp.ece > 0.3 and sharp.ece_equal_mass > 0.3
    assert sharp.accuracy == honest.accuracy and sharp.brier > honest.brier  # the order of classes is the same


def test_certain_and_always_wrong() -> None:
    found = reliability(np.eye(3)[[0, 1, 2]], np.array([1, 2, 0]))
    assert (found.ece, found.ece_equal_mass, found.brier, found.accuracy) == (1.0, 1.0, 2.0, 0.0)


def test_nothing_to_judge_is_not_zero() -> None:
    assert np.isnan(expected_error(np.empty(0), np.empty(0), np.empty(0, dtype=int)))
