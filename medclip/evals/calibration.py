"""Calibration of a classification: is a class that is given 80 % right 80 times of a hundred?

Of each sample the probability of the predicted class, its confidence, is held against whether it was right (Guo et al.
2017, arXiv:1706.04599, section 2). The expected calibration error is the mean over bins of |share right - mean
confidence|, weighted by the samples in a bin: once with 15 bins of equal width, as papers give it, and once with 15 of
equal mass, which no bin with a handful of samples can sway. Neither has a bootstrap interval: resampling adds noise to
every bin, so its values would lie above the estimate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.special import softmax

BINS = 15  # Guo et al. 2017


@dataclass(frozen=True)
class Bin:
    """One bin of a reliability diagram: mean predicted probability, share of samples where it came true, samples."""

    predicted: float
    observed: float
    count: int


@dataclass(frozen=True)
class Reliability:
    """How far confidence and accuracy of a classification lie apart, and the diagram's bins of equal width."""

    bins: list[Bin]  # those with samples, lowest confidence first
    ece: float  # over bins of equal width
    ece_equal_mass: float
    brier: float  # 0 to 2
    confidence: float  # mean
    accuracy: float
    temperature: float | None = None  # that cosines were multiplied by before the softmax; None where there were none


def probabilities(logits: Float[np.ndarray, "n c"]) -> Float[np.ndarray, "n c"]:
    """Softmax in float64."""
    return softmax(np.asarray(logits, dtype=np.float64), axis=1)


def equal_width_bins(probability: Float[np.ndarray, " n"], bins: int = BINS) -> Int[np.ndarray, " n"]:
    """Bin of each sample, 0..bins-1; a value on a border belongs to the upper bin, 1 to the last."""
    return np.minimum(np.searchsorted(np.linspace(0, 1, bins + 1), probability, side="right") - 1, bins - 1)


def equal_mass_bins(probability: Float[np.ndarray, " n"], bins: int = BINS) -> Int[np.ndarray, " n"]:
    """Bin of each sample, 0..bins-1: as many samples in each as ties allow, equal probabilities in the same bin."""
    rank = np.searchsorted(np.sort(probability), probability, side="left")
    return rank * bins // max(len(probability), 1)


def expected_error(
    probability: Float[np.ndarray, " n"], truth: Float[np.ndarray, " n"], place: Int[np.ndarray, " n"]
) -> float:
    """Mean of |predicted - observed| over the bins that `place` names, weighted by their samples; NaN without any."""
    if not len(probability):
        return float("nan")
    gaps = np.bincount(place, weights=probability - truth)
    return float(np.abs(gaps).sum() / len(probability))


def filled_bins(
    probability: Float[np.ndarray, " n"], truth: Float[np.ndarray, " n"], place: Int[np.ndarray, " n"]
) -> list[Bin]:
    """The bins that have samples, in their order."""
    count = np.bincount(place)
    predicted, observed = (np.bincount(place, weights=values) for values in (probability, truth))
    return [Bin(float(predicted[b] / n), float(observed[b] / n), int(n)) for b, n in enumerate(count) if n]


def brier(probability: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"]) -> float:
    """Brier's score over several classes (1950), 0 to 2: mean squared distance to the one-hot truth."""
    own = probability[np.arange(len(labels)), labels]
    return float(((probability**2).sum(axis=1) + 1 - 2 * own).mean())


def reliability(
    probability: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"], temperature: float | None = None
) -> Reliability:
    """Calibration of a classifier from its probabilities; among equal ones the first class is the predicted one."""
    confidence = probability.max(axis=1)
    right = (probability.argmax(axis=1) == labels).astype(np.float64)
    width = equal_width_bins(confidence)
    return Reliability(
        bins=filled_bins(confidence, right, width),
        ece=expected_error(confidence, right, width),
        ece_equal_mass=expected_error(confidence, right, equal_mass_bins(confidence)),
        brier=brier(probability, labels),
        confidence=float(confidence.mean()),
        accuracy=float(right.mean()),
        temperature=temperature,
    )
