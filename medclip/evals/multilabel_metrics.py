"""Metrics of one class of a multi-label classification, as functions of sample weights (see `metrics`).

Labels are 1, 0, or NaN where nobody knows; such samples are left out of that class. A class is defined if the weights
leave both positives and negatives, else NaN: it is then left out of a mean and named, and never counts as 0.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from medclip.evals.calibration import BINS, equal_mass_bins, expected_error


def ranking(
    scores: Float[np.ndarray, " n"], labels: Float[np.ndarray, " n"], weights: Float[np.ndarray, "b n"]
) -> tuple[Float[np.ndarray, " b"], Float[np.ndarray, " b"]]:
    """AUROC and average precision under each row of weights, in one pass: (b,) each.

    AUROC is the chance that a positive outscores a negative, ties counting half (Mann-Whitney). Average precision is
    the precision at each positive's threshold, averaged over the positives. Both are scikit-learn's, `sample_weight`
    included. Only the negatives are summed along the ranking, and read at the places of the positives.
    """
    inside, outside = _ascending(scores, labels == 1), _ascending(scores, labels == 0)
    own, rival = scores[inside], scores[outside]
    lower, upper = np.searchsorted(rival, own, side="left"), np.searchsorted(rival, own, side="right")
    block = np.searchsorted(own, own, side="left")  # where the positives of the same score begin

    below = np.zeros((len(weights), len(outside) + 1))  # weight of the first k negatives
    np.cumsum(np.take(weights, outside, axis=1), axis=1, out=below[:, 1:])
    gain = np.take(weights, inside, axis=1)
    hits = np.zeros((len(weights), len(inside) + 1))
    np.cumsum(gain, axis=1, out=hits[:, 1:])
    positives, negatives = hits[:, -1], below[:, -1]
    beaten = np.take(below, lower, axis=1)

    area = (gain * (beaten + np.take(below, upper, axis=1))).sum(axis=1) / 2
    found = positives[:, None] - np.take(hits, block, axis=1)  # positives that score as much or more
    called = found + negatives[:, None] - beaten
    precision = np.divide(found, called, out=np.zeros_like(found), where=called > 0)
    both = (positives > 0) & (negatives > 0)
    return _ratio(area, positives * negatives, both), _ratio((gain * precision).sum(axis=1), positives, both)


def _ascending(scores: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    members = np.flatnonzero(wanted)
    return members[np.argsort(scores[members], kind="stable")]


def brier(
    probability: Float[np.ndarray, "n c"], labels: Float[np.ndarray, "n c"], weights: Float[np.ndarray, "b n"]
) -> Float[np.ndarray, "b c"]:
    """Mean squared difference of probability and truth (Brier 1950) of each class; NaN where no weight is left."""
    known = ~np.isnan(labels)
    total = weights @ known.astype(np.float64)
    return _ratio(weights @ np.where(known, (probability - labels) ** 2, 0.0), total, total > 0)


def calibration_error(probability: Float[np.ndarray, " n"], labels: Float[np.ndarray, " n"], bins: int = BINS) -> float:
    """Expected calibration error over bins of equal mass: the mean of |predicted - observed|, weighted by the bins.

    It has no bootstrap interval: resampling adds noise to each bin, so its values lie above the estimate.
    """
    known = ~np.isnan(labels)
    probability, labels = probability[known], labels[known]
    return expected_error(probability, labels, equal_mass_bins(probability, bins))


def _ratio(top: np.ndarray, bottom: np.ndarray, defined: np.ndarray) -> np.ndarray:
    return np.divide(top, bottom, out=np.full(top.shape, np.nan), where=defined)
