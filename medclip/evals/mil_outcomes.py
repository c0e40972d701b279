"""What a model said of each slide, and every metric of it under any sample weights.

Slides of several folds were judged by a model each. Scores of two models are on no common scale, so that ranks over all
of them together would mix the models' offsets into the result (Forman & Scholz 2010, SIGKDD Explorations 12:49): every
metric is that of each fold, averaged over the folds in which it is defined, under each resample as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

from medclip.evals import metrics as m
from medclip.evals.cindex import concordance
from medclip.evals.multilabel_metrics import ranking

HEADLINE = {
    "classes": ("mean_per_class_recall", "auroc"),
    "ordinal": ("kappa", "mean_per_class_recall"),
    "multilabel": ("auroc", "mean_average_precision"),
    "survival": ("cindex",),
}
LOCATED = "attention_auroc"
_TINY = np.finfo(np.float64).tiny


@dataclass(frozen=True)
class MilOutcomes:
    """Slides, row by row.

    `labels` are one-hot (classes and grades) or multi-hot (findings, NaN where unknown), `scores` probabilities, or the
    risk alone; both have no column for what a target does not have. `located` is the AUROC of attention against the
    slide's region, NaN where there is none; `fold` says which model judged a slide.
    """

    keys: list[str]
    groups: list[str]
    target: str
    classes: list[str]
    labels: Float[np.ndarray, "n c"]
    scores: Float[np.ndarray, "n s"]
    time: Float[np.ndarray, " n"]
    event: Float[np.ndarray, " n"]
    located: Float[np.ndarray, " n"]
    fold: Int[np.ndarray, " n"]

    @property
    def truth(self) -> Int[np.ndarray, " n"]:
        """Class or grade of each slide."""
        return self.labels.argmax(axis=1)

    @property
    def said(self) -> Int[np.ndarray, " n"]:
        """The likeliest class or grade of each slide."""
        return self.scores.argmax(axis=1)

    @cached_property
    def log_odds(self) -> Float[np.ndarray, "n c"]:
        """By which slides are ranked for a class: as by its probability, but not all alike where that rounds to 1."""
        if self.target == "multilabel":
            return self.scores
        rest = self.scores.sum(axis=1, keepdims=True) - self.scores
        for c in range(self.scores.shape[1]):  # without cancellation
            rest[:, c] = np.delete(self.scores, c, axis=1).sum(axis=1)
        return np.log(np.maximum(self.scores, _TINY)) - np.log(np.maximum(rest, _TINY))

    def values(self, weights: Float[np.ndarray, "b n"]) -> dict[str, Float[np.ndarray, " b"]]:
        """Every metric under each row of weights; `auroc:CLASS` and `average_precision:CLASS` are of one class."""
        parts = [self._of(np.flatnonzero(self.fold == fold), weights) for fold in np.unique(self.fold)]
        if len(parts) == 1:
            return parts[0]
        return {name: m.macro(np.stack([part[name] for part in parts], axis=1)) for name in parts[0]}

    def of_fold(self, fold: int) -> dict[str, float]:
        """The metrics of one fold."""
        rows = np.flatnonzero(self.fold == fold)
        return {name: float(value[0]) for name, value in self._of(rows, np.ones((1, len(self.keys)))).items()}

    def _of(self, rows: Int[np.ndarray, " k"], weights: Float[np.ndarray, "b n"]) -> dict[str, np.ndarray]:
        weights = weights[:, rows]
        found: dict[str, np.ndarray] = {}
        if self.target in ("classes", "ordinal"):
            table = m.confusion(self.truth[rows], self.said[rows], len(self.classes), weights)
            if self.target == "ordinal":
                found["kappa"] = quadratic_kappa(table)
            found["mean_per_class_recall"] = m.macro(m.class_recall(table))
            found["acc1"] = m.weighted_mean(self.said[rows] == self.truth[rows], weights)
        if self.target in ("classes", "multilabel"):
            each = [ranking(self.log_odds[rows, c], self.labels[rows, c], weights) for c in range(len(self.classes))]
            area, precision = (np.stack(own, axis=1) for own in zip(*each, strict=True))
            found |= {"auroc": m.macro(area), "mean_average_precision": m.macro(precision)}
            for c, name in enumerate(self.classes):
                found |= {f"auroc:{name}": area[:, c], f"average_precision:{name}": precision[:, c]}
        if self.target == "survival":
            found["cindex"] = concordance(self.scores[rows, 0], self.time[rows], self.event[rows], weights)
        if not np.isnan(self.located).all():
            there = ~np.isnan(self.located[rows])
            found[LOCATED] = m.weighted_mean(self.located[rows][there], weights[:, there])
        return found

    @property
    def undefined(self) -> list[str]:
        """Classes without slides inside or outside."""
        if self.target not in ("classes", "multilabel"):
            return []
        return [
            n for n, own in zip(self.classes, self.labels.T, strict=True) if not ((own == 0).any() and (own == 1).any())
        ]

    def chance(self) -> dict[str, float]:
        """What scores that know nothing reach."""
        count = len(self.classes)
        if self.target == "survival":
            found = {"cindex": 0.5}
        elif self.target == "ordinal":
            found = {"kappa": 0.0, "mean_per_class_recall": 1 / count}
        else:
            defined = [c for c, name in enumerate(self.classes) if name not in self.undefined]
            shares = {self.classes[c]: float(np.nanmean(self.labels[:, c])) for c in defined}
            found = {"auroc": 0.5} | ({"mean_per_class_recall": 1 / count} if self.target == "classes" else {})
            if shares:
                found["mean_average_precision"] = float(np.mean(list(shares.values())))
            for name, share in shares.items():
                found |= {f"auroc:{name}": 0.5, f"average_precision:{name}": share}
        return found | ({} if np.isnan(self.located).all() else {LOCATED: 0.5})


def quadratic_kappa(table: Float[np.ndarray, "b c c"]) -> Float[np.ndarray, " b"]:
    """Cohen's kappa with squared distances as weights (Cohen 1968), from tables of truth by prediction.

    1 - sum_ij (i - j)^2 O_ij / sum_ij (i - j)^2 E_ij, E being what the margins give if both were independent. NaN where
    all is one grade.
    """
    grades = np.arange(table.shape[1])
    distance = (grades[:, None] - grades) ** 2
    total = table.sum(axis=(1, 2))
    expected = table.sum(axis=2)[:, :, None] * table.sum(axis=1)[:, None, :]
    apart = (distance * expected).sum(axis=(1, 2))
    return 1 - np.divide(
        total * (distance * table).sum(axis=(1, 2)), apart, out=np.full(len(table), np.nan), where=apart > 0
    )
