"""Checkpoints side by side: every metric with its interval, and against the base the paired difference and verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from medclip.evals.bootstrap import Bootstrap, Difference, Estimate, difference, draws, interval
from medclip.evals.multilabel_outcomes import on_shared_classes
from medclip.evals.result import LABELS, Result
from medclip.types import UserError


@dataclass(frozen=True)
class MetricRow:
    """One metric of one evaluation: by checkpoint, and for all but the first its difference to the first."""

    metric: str
    lower_is_better: bool
    chance: float | None
    estimates: dict[str, Estimate]
    differences: dict[str, Difference]
    draws: dict[str, Float[np.ndarray, " samples"]] = field(default_factory=dict, repr=False)  # of each checkpoint

    @property
    def label(self) -> str:
        """The metric as people read it."""
        return LABELS.get(self.metric, self.metric.replace("_", " "))

    @property
    def of_class(self) -> str | None:
        """The class that `metric:CLASS` is of; None for one over all of them."""
        return self.metric.partition(":")[2] or None

    @property
    def on_unit_scale(self) -> bool:
        """Whether a plot from 0 to 1 can hold it."""
        bounds = [x for e in self.estimates.values() for x in (e.value, e.low, e.high) if x == x]
        return not self.lower_is_better and all(0 <= x <= 1 for x in bounds)


@dataclass(frozen=True)
class Comparison:
    """One evaluation of all checkpoints; the first is the base. `results` holds each one's own."""

    name: str
    results: dict[str, Result]
    rows: list[MetricRow]
    samples: int
    groups: int

    @property
    def any_result(self) -> Result:
        """For what is the same for every checkpoint: role, task, chance, sizes."""
        return next(iter(self.results.values()))

    @property
    def overall(self) -> list[MetricRow]:
        return [row for row in self.rows if row.of_class is None]

    @property
    def by_class(self) -> dict[str, list[MetricRow]]:
        """Class -> its rows, of evaluations that have some."""
        names = dict.fromkeys(row.of_class for row in self.rows if row.of_class is not None)
        return {name: [row for row in self.rows if row.of_class == name] for name in names}

    @property
    def headline(self) -> list[MetricRow]:
        return [row for row in self.rows if row.metric in self.any_result.headline]


def compare(name: str, results: Mapping[str, Result], settings: Bootstrap) -> Comparison:
    """Compare the results of one evaluation, checkpoint name -> result, base first.

    Raises:
        UserError: the checkpoints were not judged on the same samples, so that nothing can be paired.
    """
    base, *others = results
    outcomes = results[base].outcomes
    for other in others:
        if results[other].outcomes.keys != outcomes.keys or results[other].outcomes.groups != outcomes.groups:
            raise UserError(
                f"evaluation {name!r} saw other samples for {other!r} ({len(results[other].outcomes.keys)}) than for "
                f"{base!r} ({len(outcomes.keys)}): evaluate both again on the same data"
            )
    results = on_shared_classes(results)
    points = {model: result.metrics for model, result in results.items()}
    drawn = {model: draws(r.outcomes.values, r.outcomes.groups, settings) for model, r in results.items()}
    rows = []
    for metric in points[base]:
        own = {model: drawn[model].get(metric) for model in results}
        lower = metric in results[base].lower_is_better
        rows.append(
            MetricRow(
                metric,
                lower,
                results[base].chance.get(metric),
                {k: Estimate(points[k][metric], *interval(own[k], settings.level)) for k in results},
                {
                    k: difference(
                        points[base][metric],
                        points[k][metric],
                        own[base],
                        own[k],
                        settings.level,
                        lower,
                    )
                    for k in others
                },
                {k: drawn for k, drawn in own.items() if drawn is not None},
            )
        )
    return Comparison(name, dict(results), rows, len(outcomes.keys), len(set(outcomes.groups)))
