"""What happened to each sample of a multi-label classification, and how checkpoints of unequal classes are compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from scipy.special import expit

from medclip.evals.metrics import macro
from medclip.evals.multilabel_metrics import brier, ranking
from medclip.evals.result import Result


@dataclass(frozen=True)
class MultiLabelOutcomes:
    """Labels and log-odds of every class, of each sample.

    A label is NaN where it is unknown; a column of `log_odds` is NaN where the checkpoint does not know the class.
    Averages are over the classes with positives and negatives, without those of `left_out`.
    """

    keys: list[str]
    groups: list[str]
    classes: list[str]
    labels: Float[np.ndarray, "n c"]
    log_odds: Float[np.ndarray, "n c"]
    left_out: frozenset[str] = frozenset()

    @property
    def missing(self) -> list[str]:
        """Classes that the checkpoint does not score."""
        return [name for name, column in zip(self.classes, self.log_odds.T, strict=True) if np.isnan(column).all()]

    @property
    def undefined(self) -> list[str]:
        """Classes without positives or without negatives."""
        seen = [(self.labels == value).any(axis=0) for value in (0, 1)]
        return [name for name, both in zip(self.classes, seen[0] & seen[1], strict=True) if not both]

    @property
    def averaged(self) -> list[int]:
        """Columns that averages are over."""
        without = self.left_out | set(self.missing) | set(self.undefined)
        return [i for i, name in enumerate(self.classes) if name not in without]

    def values(self, weights: Float[np.ndarray, "b n"]) -> dict[str, Float[np.ndarray, " b"]]:
        """Every metric under each row of sample weights; `auroc:CLASS` and `average_precision:CLASS` are of one class.

        A class that a resample leaves without positives or negatives is left out of that resample's averages.
        """
        area, precision = np.full((2, len(weights), len(self.classes)), np.nan)
        for c, name in enumerate(self.classes):
            if name not in self.missing:
                area[:, c], precision[:, c] = ranking(self.log_odds[:, c], self.labels[:, c], weights)
        averaged = self.averaged
        squares = brier(expit(self.log_odds[:, averaged]), self.labels[:, averaged], weights)
        found = {
            "auroc": macro(area[:, averaged]),
            "mean_average_precision": macro(precision[:, averaged]),
            "brier": macro(squares),
        }
        for c, name in enumerate(self.classes):
            found |= {f"auroc:{name}": area[:, c], f"average_precision:{name}": precision[:, c]}
        return found

    def chance(self) -> dict[str, float]:
        """What scores that know nothing reach: half the area, and the prevalence as precision."""
        prevalence = {
            n: float(np.nanmean(self.labels[:, c])) for c, n in enumerate(self.classes) if n not in self.undefined
        }
        found = {"auroc": 0.5}
        if self.averaged:
            found["mean_average_precision"] = float(np.mean([prevalence[self.classes[c]] for c in self.averaged]))
        for name, share in prevalence.items():
            found |= {f"auroc:{name}": 0.5, f"average_precision:{name}": share}
        return found


def on_shared_classes(results: Mapping[str, Result]) -> dict[str, Result]:
    """The results, averaged over the classes that every checkpoint scores; others than multi-label ones as they are."""
    own = {k: r.outcomes for k, r in results.items() if isinstance(r.outcomes, MultiLabelOutcomes)}
    left_out = frozenset(name for outcomes in own.values() for name in outcomes.missing)
    shared = {k: replace(outcomes, left_out=left_out) for k, outcomes in own.items()}
    return dict(results) | {k: replace(results[k], outcomes=o, chance=o.chance()) for k, o in shared.items()}
