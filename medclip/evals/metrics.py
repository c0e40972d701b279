"""Classification metrics as functions of sample weights, so that one formula serves the estimate and its bootstrap.

Weights of ones give the usual value; a resample with replacement is the same data with whole-number weights (how often
each sample was drawn). Every metric therefore takes weights (b, n), one row a resample, and returns (b,) values; with
`sample_weight` scikit-learn gives the same numbers one row at a time (the tests hold the two together to 1e-12).

A class may be undefined: no recall without samples, no AUROC unless there are samples inside and outside it, no F1 if
it is neither present nor predicted. It is then NaN in the per-class arrays and left out of a macro average, and
`undefined` names it so that a report can say so; it never counts as 0.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int


def log_odds(logits: Float[np.ndarray, "n c"]) -> Float[np.ndarray, "n c"]:
    """log p/(1-p) of each class's softmax probability p: the same order as p, without its saturation at 0 and 1."""
    logits = np.asarray(logits, dtype=np.float64)
    if logits.shape[1] < 2:
        return logits
    # log(1-p_c) needs the sum over the others; taking the class out keeps it exact where p_c rounds to 1.
    others = np.empty_like(logits)
    for c in range(logits.shape[1]):
        rest = np.delete(logits, c, axis=1)
        top = rest.max(axis=1)
        others[:, c] = top + np.log(np.exp(rest - top[:, None]).sum(axis=1))
    return logits - others


def top_k(scores: Float[np.ndarray, "n c"], k: int) -> Int[np.ndarray, "n k"]:
    """The k best classes of each sample, best first; among equal scores the first configured class wins (argmax)."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def confusion(
    labels: Int[np.ndarray, " n"], predicted: Int[np.ndarray, " n"], classes: int, weights: Float[np.ndarray, "b n"]
) -> Float[np.ndarray, "b c c"]:
    """Weight of the samples of class row predicted as class column."""
    cells, cell_of = np.unique(labels * classes + predicted, return_inverse=True)
    onehot = np.zeros((len(labels), len(cells)))
    onehot[np.arange(len(labels)), cell_of] = 1.0
    table = np.zeros((len(weights), classes * classes))
    table[:, cells] = weights @ onehot
    return table.reshape(len(weights), classes, classes)


def class_recall(table: Float[np.ndarray, "b c c"]) -> Float[np.ndarray, "b c"]:
    """Share of each class's samples found; NaN for a class without samples."""
    return _ratio(np.diagonal(table, axis1=1, axis2=2), table.sum(axis=2))


def class_f1(table: Float[np.ndarray, "b c c"]) -> Float[np.ndarray, "b c"]:
    """F1 = 2 tp / (support + predicted); 0 for a class without a hit, NaN for one neither present nor predicted."""
    return _ratio(2 * np.diagonal(table, axis1=1, axis2=2), table.sum(axis=2) + table.sum(axis=1))


def auroc(
    scores: Float[np.ndarray, " n"], positive: np.ndarray, weights: Float[np.ndarray, "b n"]
) -> Float[np.ndarray, " b"]:
    """Area under the ROC curve: the chance that a positive outscores a negative, ties counting half.

    NaN where the weights leave no positive or no negative.
    """
    order = np.argsort(scores, kind="stable")
    ordered = scores[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])  # first index of each block of equal scores
    weights = weights[:, order]
    inside = np.asarray(positive, dtype=bool)[order]
    gain = np.add.reduceat(weights * inside, starts, axis=1)
    loss = np.add.reduceat(weights * ~inside, starts, axis=1)
    below = np.cumsum(loss, axis=1) - loss
    return _ratio((gain * (below + loss / 2)).sum(axis=1), gain.sum(axis=1) * loss.sum(axis=1))


def class_auroc(
    scores: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"], weights: Float[np.ndarray, "b n"]
) -> Float[np.ndarray, "b c"]:
    """One-vs-rest AUROC of every class; NaN where it is undefined."""
    return np.stack([auroc(scores[:, c], labels == c, weights) for c in range(scores.shape[1])], axis=1)


def macro(per_class: Float[np.ndarray, "b c"]) -> Float[np.ndarray, " b"]:
    """Mean over the classes where the metric is defined; NaN where it is defined for none."""
    defined = ~np.isnan(per_class)
    return _ratio(np.where(defined, per_class, 0.0).sum(axis=1), defined.sum(axis=1))


def undefined(per_class: Float[np.ndarray, " c"], classes: list[str]) -> list[str]:
    """Names of the classes that a macro average had to leave out."""
    return [name for name, value in zip(classes, per_class, strict=True) if np.isnan(value)]


def weighted_mean(values: Float[np.ndarray, " n"], weights: Float[np.ndarray, "b n"]) -> Float[np.ndarray, " b"]:
    """Mean of `values` under each row of weights; NaN for a row without weight."""
    return _ratio(weights @ values.astype(np.float64), weights.sum(axis=1))


def weighted_median(values: np.ndarray, weights: Float[np.ndarray, "b n"]) -> Float[np.ndarray, " b"]:
    """`np.median` of the values repeated `weights` (whole numbers) times."""
    order = np.argsort(values, kind="stable")
    ordered = values[order].astype(np.float64)
    reached = np.cumsum(weights[:, order], axis=1)
    half = reached[:, -1:] / 2
    low = (reached >= half).argmax(axis=1)
    high = (reached > half).argmax(axis=1)  # differs from `low` only where the middle falls between two values
    return np.where(half[:, 0] > 0, (ordered[low] + ordered[high]) / 2, np.nan)


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom > 0)
