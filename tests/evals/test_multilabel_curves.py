"""Curves and thresholds against scikit-learn and by trying every threshold."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sklearn.metrics as sk
from scipy.special import expit, logit

from medclip.evals.multilabel_curves import choose_thresholds, operating_points, reliability, roc_curve
from medclip.evals.multilabel_metrics import ranking
from tests.evals.test_multilabel_metrics import sample


def with_unknown(n: int = 300) -> tuple[np.ndarray, np.ndarray]:
    scores, positive = sample(n)
    return scores, np.where(np.arange(n) % 7 == 0, np.nan, positive.astype(float))


def test_thresholds_are_the_best_of_all() -> None:
    scores, labels = with_unknown()
    known = ~np.isnan(labels)
    rates = []
    for threshold in np.unique(scores[known]):
        called = scores[known] >= threshold
        truth = labels[known] == 1
        rates.append((threshold, called[truth].mean(), 1 - called[~truth].mean()))
    chosen = choose_thresholds(scores, labels)
    best = max(sensitivity + specificity for _, sensitivity, specificity in rates)
    assert next(s + p for t, s, p in rates if t == chosen.youden) == pytest.approx(best)
    assert chosen.sensitive == max(t for t, s, _ in rates if s >= 0.9)
    youden, sensitive = operating_points(scores, labels, chosen)
    assert youden.sensitivity + youden.specificity == pytest.approx(best)
    assert sensitive.sensitivity >= 0.9
    for point, threshold in ((youden, chosen.youden), (sensitive, chosen.sensitive)):
        tn, fp, fn, tp = sk.confusion_matrix(labels[known], scores[known] >= threshold).ravel()
        assert (point.tp, point.fp, point.fn, point.tn) == (tp, fp, fn, tn)
        assert point.ppv == tp / (tp + fp) and point.npv == tn / (tn + fn)
        assert logit(point.threshold) == pytest.approx(threshold)


def test_a_sensitivity_of_exactly_nine_tenths_is_enough() -> None:
    scores = np.r_[np.arange(10, 0, -1.0), 0.5]  # ten positives above one negative
    assert choose_thresholds(scores, np.r_[np.ones(10), 0]).sensitive == 2.0


def test_thresholds_of_other_samples_are_applied_as_they_are() -> None:
    labels = np.array([1.0, 0, 1, 0])
    (youden, _) = operating_points(
        np.array([3.0, 2, -1, -2]), labels, choose_thresholds(np.array([5.0, 4]), labels[:2])
    )
    assert (youden.tp, youden.fp, youden.fn, youden.tn) == (0, 0, 2, 2)
    assert youden.sensitivity == 0 and math.isnan(youden.ppv)


@pytest.mark.parametrize("labels", [np.ones(5), np.zeros(5), np.full(5, np.nan)])
def test_a_class_of_one_value_has_no_curve_and_no_threshold(labels: np.ndarray) -> None:
    scores = np.arange(5.0)
    chosen = choose_thresholds(scores, labels)
    assert math.isnan(chosen.youden) and operating_points(scores, labels, chosen) == []
    assert roc_curve(scores, labels) == []


def test_the_curve_is_scikit_learns_without_straight_pieces() -> None:
    scores, labels = with_unknown()
    known = ~np.isnan(labels)
    x, y, _ = sk.roc_curve(labels[known], scores[known], drop_intermediate=False)
    drawn = np.array(roc_curve(scores, labels, most=10**6))
    assert {tuple(np.round(p, 12)) for p in drawn} <= {tuple(np.round(p, 12)) for p in zip(x, y, strict=True)}
    area = ranking(scores, labels, np.ones((1, 300)))[0][0]
    assert np.trapezoid(drawn[:, 1], drawn[:, 0]) == pytest.approx(area, abs=1e-12)  # nothing of it was lost


def test_a_long_curve_is_thinned_and_keeps_its_ends_and_its_area() -> None:
    scores, positive = sample(20_000, decimals=9)
    drawn = np.array(roc_curve(scores, positive.astype(float)))
    assert len(drawn) <= 80 and drawn[0].tolist() == [0, 0] and drawn[-1].tolist() == [1, 1]
    assert np.trapezoid(drawn[:, 1], drawn[:, 0]) == pytest.approx(sk.roc_auc_score(positive, scores), abs=2e-3)


def test_reliability_of_a_calibrated_score_lies_on_the_diagonal() -> None:
    rng = np.random.default_rng(0)
    probability = rng.random(50_000)
    labels = (rng.random(50_000) < probability).astype(float)
    labels[:1000] = np.nan
    bins = reliability(logit(probability), labels)
    assert sum(b.count for b in bins) == 49_000 and len(bins) == 10
    assert max(abs(b.predicted - b.observed) for b in bins) < 0.02
    assert [b.predicted for b in bins] == pytest.approx(np.arange(0.05, 1, 0.1), abs=0.01)
    over = reliability(3 * logit(probability), labels)  # too sure of itself
    assert over[0].observed - over[0].predicted > 0.03 and expit(3 * logit(0.05)) < over[-1].predicted
