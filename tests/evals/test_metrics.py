"""Weighted metrics against scikit-learn and NumPy, one resample's weights at a time."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import sklearn.metrics as sk
from scipy.special import expit, log_softmax

from medclip.evals import metrics as m

CASES = [(0, 200, 3), (1, 57, 2), (2, 400, 9)]


def draw(seed: int, n: int, c: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, c, n)
    # Rounded, so that there are ties between samples; the argmax of a row is unique all the same.
    logits = rng.normal(size=(n, c)).round(2) + 1.5 * np.eye(c)[labels] + np.arange(c) * 1e-4
    weights = np.vstack([np.ones(n), rng.multinomial(n, np.full(n, 1 / n), size=4)]).astype(float)
    return labels, logits, weights


@pytest.mark.parametrize(("seed", "n", "c"), CASES)
def test_equal_to_scikit_learn(seed: int, n: int, c: int) -> None:
    labels, logits, weights = draw(seed, n, c)
    predicted = logits.argmax(axis=1)
    table = m.confusion(labels, predicted, c, weights)
    odds = m.log_odds(logits)
    for row, w in enumerate(weights):
        np.testing.assert_allclose(table[row], sk.confusion_matrix(labels, predicted, sample_weight=w), atol=1e-12)
        want = {
            "accuracy": sk.accuracy_score(labels, predicted, sample_weight=w),
            "balanced": sk.balanced_accuracy_score(labels, predicted, sample_weight=w),
            "f1": sk.f1_score(labels, predicted, average="macro", sample_weight=w),
            "auroc": np.mean([sk.roc_auc_score(labels == k, odds[:, k], sample_weight=w) for k in range(c)]),
        }
        got = {
            "accuracy": m.weighted_mean(predicted == labels, weights)[row],
            "balanced": m.macro(m.class_recall(table))[row],
            "f1": m.macro(m.class_f1(table))[row],
            "auroc": m.macro(m.class_auroc(odds, labels, weights))[row],
        }
        for name, value in want.items():
            assert got[name] == pytest.approx(value, abs=1e-12), name


def test_auroc_equals_scikit_learn_multiclass_on_probabilities() -> None:
    labels, logits, _ = draw(3, 300, 5)
    probabilities = np.exp(log_softmax(logits, axis=1))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    want = sk.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
    got = m.macro(m.class_auroc(m.log_odds(logits), labels, np.ones((1, 300))))[0]
    assert got == pytest.approx(want, abs=1e-12)


def test_log_odds_is_the_logit_of_softmax_and_does_not_saturate() -> None:
    logits = np.random.default_rng(0).normal(size=(50, 4))
    np.testing.assert_allclose(expit(m.log_odds(logits)), np.exp(log_softmax(logits, axis=1)), atol=1e-14)
    # As probabilities both are exactly 1.0, and their order would be lost.
    assert (np.diff(m.log_odds(np.array([[100.0, 0.0, 0.0], [120.0, 0.0, 0.0]]))[:, 0]) > 19).all()


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_equals_scikit_learn(k: int) -> None:
    labels, logits, weights = draw(4, 150, 8)
    hit = (m.top_k(logits, k) == labels[:, None]).any(axis=1)
    for row, w in enumerate(weights):
        want = sk.top_k_accuracy_score(labels, logits, k=k, sample_weight=w)
        assert m.weighted_mean(hit, weights)[row] == pytest.approx(want, abs=1e-12)


def test_undefined_classes_are_named_and_left_out_of_the_mean() -> None:
    labels = np.array([0, 0, 1, 1])  # class 2 is a candidate without samples, never predicted
    logits = np.array([[2.0, 1, 0], [1, 2, 0], [1, 2, 0], [0, 2, 1]])
    ones = np.ones((1, 4))
    table = m.confusion(labels, logits.argmax(axis=1), 3, ones)
    recall, f1 = m.class_recall(table)[0], m.class_f1(table)[0]
    auroc = m.class_auroc(m.log_odds(logits), labels, ones)[0]
    for values in (recall, f1, auroc):
        assert m.undefined(values, ["a", "b", "c"]) == ["c"]
    assert m.macro(recall[None])[0] == pytest.approx(0.75)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert m.macro(f1[None])[0] == pytest.approx(sk.f1_score(labels, logits.argmax(axis=1), average="macro"))
    assert np.isnan(m.macro(np.full((1, 3), np.nan))[0])


def test_a_class_predicted_but_absent_has_f1_zero_as_in_scikit_learn() -> None:
    labels, predicted = np.array([0, 0, 1]), np.array([0, 2, 1])
    table = m.confusion(labels, predicted, 3, np.ones((1, 3)))
    assert m.class_f1(table)[0, 2] == 0
    assert m.macro(m.class_f1(table))[0] == pytest.approx(sk.f1_score(labels, predicted, average="macro"), abs=1e-12)


def test_one_class_only_leaves_auroc_undefined() -> None:
    assert np.isnan(m.auroc(np.array([0.1, 0.9]), np.array([True, True]), np.ones((1, 2)))[0])


def test_weighted_median_is_the_median_of_the_repeated_values() -> None:
    rng = np.random.default_rng(5)
    values = rng.integers(1, 40, 31)
    weights = rng.multinomial(31, np.full(31, 1 / 31), size=50).astype(float)
    weights[::2, 0] += 1  # even totals too
    want = [np.median(np.repeat(values, w.astype(int))) for w in weights]
    np.testing.assert_array_equal(m.weighted_median(values, weights), want)
