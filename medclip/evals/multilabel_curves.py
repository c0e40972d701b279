"""What is drawn and tabled of one class: ROC curve, reliability, and operating points. Labels may be NaN (unknown)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.special import expit

from medclip.evals.calibration import Bin, equal_mass_bins, filled_bins

DRAWN_BINS = 10
MOST_POINTS = 80  # of a drawn ROC curve
SENSITIVITY = 0.9


@dataclass(frozen=True)
class Thresholds:
    """Log-odds from which a class is called present, by two rules; NaN where the class lacks positives or negatives."""

    youden: float
    sensitive: float


@dataclass(frozen=True)
class OperatingPoint:
    """What a threshold yields. `threshold` is a probability; a ratio is NaN where nothing stands below its line."""

    rule: str
    threshold: float
    tp: int
    fp: int
    fn: int
    tn: int

    @property
    def sensitivity(self) -> float:
        return _share(self.tp, self.tp + self.fn)

    @property
    def specificity(self) -> float:
        return _share(self.tn, self.tn + self.fp)

    @property
    def ppv(self) -> float:
        return _share(self.tp, self.tp + self.fp)

    @property
    def npv(self) -> float:
        return _share(self.tn, self.tn + self.fn)


def sweep(
    scores: Float[np.ndarray, " n"], labels: Float[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Every distinct score as a threshold, highest first, with the numbers of true and false positives at it."""
    known = ~np.isnan(labels)
    scores, labels = scores[known], labels[known]
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    ends = np.flatnonzero(np.r_[ordered[1:] != ordered[:-1], True]) if len(ordered) else np.empty(0, dtype=int)
    hits = np.cumsum(labels[order])[ends]
    return ordered[ends], hits, ends + 1.0 - hits


def choose_thresholds(scores: Float[np.ndarray, " n"], labels: Float[np.ndarray, " n"]) -> Thresholds:
    """Youden's J (sensitivity + specificity - 1 at its largest), and the highest that finds 90 % of the positives."""
    threshold, hits, alarms = sweep(scores, labels)
    if not len(threshold) or hits[-1] == 0 or alarms[-1] == 0:
        return Thresholds(float("nan"), float("nan"))
    sensitivity, false_alarm = hits / hits[-1], alarms / alarms[-1]
    enough = sensitivity >= SENSITIVITY - 1e-12
    return Thresholds(
        float(threshold[(sensitivity - false_alarm).argmax()]),
        float(threshold[enough.argmax()]),
    )


def operating_points(
    scores: Float[np.ndarray, " n"], labels: Float[np.ndarray, " n"], thresholds: Thresholds
) -> list[OperatingPoint]:
    """Both rules on these samples; none where the thresholds are undefined."""
    points = []
    for rule, threshold in (("Youden's J", thresholds.youden), ("90 % sensitivity", thresholds.sensitive)):
        if np.isnan(threshold):
            continue
        called = scores >= threshold
        table = [int(((labels == truth) & (called == said)).sum()) for truth, said in ((1, 1), (0, 1), (1, 0), (0, 0))]
        points.append(OperatingPoint(rule, float(expit(threshold)), *table))
    return points


def roc_curve(
    scores: Float[np.ndarray, " n"], labels: Float[np.ndarray, " n"], most: int = MOST_POINTS
) -> list[tuple[float, float]]:
    """Corners (false-positive rate, sensitivity) from (0, 0) to (1, 1), at most about `most`; empty if undefined."""
    _, hits, alarms = sweep(scores, labels)
    if not len(hits) or hits[-1] == 0 or alarms[-1] == 0:
        return []
    x, y = np.r_[0, alarms / alarms[-1]], np.r_[0, hits / hits[-1]]
    bends = np.ones(len(x), dtype=bool)  # points on a straight piece say nothing
    bends[1:-1] = ~np.isclose(np.diff(x)[:-1] * np.diff(y)[1:], np.diff(x)[1:] * np.diff(y)[:-1], rtol=0, atol=1e-15)
    x, y = x[bends], y[bends]
    if len(x) > most:
        walked = x + y  # both only grow, so this is the length along the steps
        kept = np.unique(np.searchsorted(walked, np.linspace(0, 2, most)).clip(max=len(x) - 1))
        x, y = x[kept], y[kept]
    return list(zip(x.tolist(), y.tolist(), strict=True))


def reliability(scores: Float[np.ndarray, " n"], labels: Float[np.ndarray, " n"]) -> list[Bin]:
    """Bins of equal mass, lowest probability first."""
    known = ~np.isnan(labels)
    predicted = expit(scores[known])
    return filled_bins(predicted, labels[known], equal_mass_bins(predicted, DRAWN_BINS))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
