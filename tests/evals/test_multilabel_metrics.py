"""Metrics of one class against scikit-learn, Mann-Whitney's count, and cases worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics as sk
from sklearn.calibration import calibration_curve

from medclip.evals.bootstrap import group_weights
from medclip.evals.calibration import BINS, equal_mass_bins
from medclip.evals.metrics import auroc
from medclip.evals.multilabel_metrics import brier, calibration_error, ranking


def sample(n: int = 400, decimals: int = 1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores with many ties, and a class of a third."""
    rng = np.random.default_rng(seed)
    positive = rng.random(n) < 0.3
    return np.round(rng.normal(0.8 * positive), decimals), positive


@pytest.mark.parametrize("decimals", [0, 1, 9])
def test_ranking_equals_scikit_learn_under_weights(decimals: int) -> None:
    scores, positive = sample(decimals=decimals)
    rng = np.random.default_rng(1)
    weights = np.concatenate(
        [
            np.ones((1, 400)),
            next(group_weights([f"p{i // 3}" for i in range(400)], 8, seed=0)),
            rng.exponential(size=(4, 400)),  # no whole numbers
        ]
    )
    area, precision = ranking(scores, positive.astype(float), weights)
    for row, w in enumerate(weights):
        assert area[row] == pytest.approx(sk.roc_auc_score(positive, scores, sample_weight=w), abs=1e-12)
        assert precision[row] == pytest.approx(sk.average_precision_score(positive, scores, sample_weight=w), abs=1e-12)
    np.testing.assert_allclose(area, auroc(scores, positive, weights), atol=1e-12)


def test_auroc_is_mann_whitneys_count_of_pairs_with_ties_half() -> None:
    scores, positive = sample(120, decimals=0, seed=3)
    pairs = scores[positive][:, None] - scores[~positive][None, :]
    want = ((pairs > 0) + 0.5 * (pairs == 0)).mean()
    assert (pairs == 0).mean() > 0.2  # ties there are
    assert ranking(scores, positive.astype(float), np.ones((1, 120)))[0][0] == pytest.approx(want, abs=1e-12)


def test_by_hand() -> None:
    # Scores 4 3 3 2 1 with truth 1 1 0 0 1: of 6 pairs, 2 + 1.5 + 0 are won; precision 1, 2/3 and 3/5.
    scores, positive = np.array([4.0, 3, 3, 2, 1]), np.array([1.0, 1, 0, 0, 1])
    area, precision = ranking(scores, positive, np.ones((1, 5)))
    assert area[0] == pytest.approx(3.5 / 6) and precision[0] == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    constant = ranking(np.zeros(5), positive, np.ones((1, 5)))
    assert constant[0][0] == 0.5 and constant[1][0] == pytest.approx(3 / 5)  # chance, and the prevalence


def test_a_class_of_one_value_is_undefined_and_never_zero() -> None:
    scores, positive = sample(50)
    weights = np.stack([np.ones(50), positive.astype(float), (~positive).astype(float), np.zeros(50)])
    area, precision = ranking(scores, positive.astype(float), weights)
    assert np.isnan(area).tolist() == np.isnan(precision).tolist() == [False, True, True, True]
    for single in (np.zeros(50), np.ones(50), np.zeros(0), np.full(50, np.nan)):
        area, precision = ranking(scores[: len(single)], single, np.ones((2, len(single))))
        assert np.isnan(area).all() and np.isnan(precision).all()


def test_brier_equals_scikit_learn() -> None:
    scores, positive = sample()
    probability = 1 / (1 + np.exp(-scores))
    weights = np.random.default_rng(2).exponential(size=(3, 400))
    for got, w in zip(
        brier(probability[:, None], positive[:, None].astype(float), weights)[:, 0], weights, strict=True
    ):
        assert got == pytest.approx(sk.brier_score_loss(positive, probability, sample_weight=w), abs=1e-12)
    assert np.isnan(brier(probability[:, None], positive[:, None].astype(float), np.zeros((1, 400)))).all()


def test_calibration_error_is_the_gap_over_quantile_bins() -> None:
    rng = np.random.default_rng(0)
    probability = rng.random(300)  # no ties: 20 in each bin, those of scikit-learn's quantiles
    positive = (rng.random(300) < probability**2).astype(float)
    observed, predicted = calibration_curve(positive, probability, n_bins=BINS, strategy="quantile")
    assert np.bincount(equal_mass_bins(probability)).tolist() == [20] * BINS
    assert calibration_error(probability, positive) == pytest.approx(np.abs(observed - predicted).mean(), abs=1e-12)
    # Half of what is called 0.9 is true, a quarter of what is called 0.25: gaps of 0.4 and 0, by mass.
    probability = np.array([0.9] * 4 + [0.25] * 4)
    truth = np.array([1.0, 1, 0, 0, 1, 0, 0, 0])
    assert calibration_error(probability, truth) == pytest.approx(0.2)
    assert len(set(equal_mass_bins(probability).tolist())) == 2


def test_unknown_labels_are_left_out() -> None:
    scores, positive = sample()
    labels = np.where(np.arange(400) % 5 == 0, np.nan, positive.astype(float))
    known = ~np.isnan(labels)
    weights = next(group_weights([f"p{i // 3}" for i in range(400)], 5, seed=0))
    for got, want in zip(ranking(scores, labels, weights), ranking(scores[known], labels[known], weights[:, known])):  # noqa: B905
        assert np.array_equal(got, want)
    probability = 1 / (1 + np.exp(-scores))
    got = brier(np.stack([probability] * 2, 1), np.stack([labels, positive], 1), weights)
    np.testing.assert_allclose(got[:, 0], brier(probability[known, None], labels[known, None], weights[:, known])[:, 0])
    np.testing.assert_allclose(got[:, 1], brier(probability[:, None], positive[:, None].astype(float), weights)[:, 0])
    assert calibration_error(probability, labels) == calibration_error(probability[known], labels[known])
    assert np.isnan(calibration_error(probability, np.full(400, np.nan)))
