"""A sweep over WiSE-FT's alpha, scored: the best blend, and the curves of what it gains and what it keeps.

Wortsman et al. 2022 (arXiv:2109.01903, figure 1) draw the accuracy on the target against the accuracy that is to stay,
one point a blend: a blend beyond both ends, above and to the right, is worth more than either model.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from medclip.evals.result import LABELS, Result, Role

Scores = dict[float, dict[str, float]]  # alpha -> "evaluation/metric" -> value

_BLUE = "#3b6ea5"
_COLUMNS = 4


class Point(NamedTuple):
    """Means over the headline metrics of the evaluations of a role: `gain` of the domain, `retention` of the rest."""

    alpha: float
    retention: float
    gain: float


@dataclass
class Sweep:
    """What each alpha scored. `roles` names the headline metrics, with the role of their evaluations."""

    scores: Scores = field(default_factory=dict)
    roles: dict[str, Role] = field(default_factory=dict)
    lower_is_better: set[str] = field(default_factory=set)

    def add(self, alpha: float, results: Mapping[str, Result]) -> None:
        """Take the results of one alpha, by evaluation."""
        self.scores[alpha] = {f"{name}/{key}": value for name, r in results.items() for key, value in r.metrics.items()}
        for name, result in results.items():
            self.roles |= {f"{name}/{key}": result.role for key in result.headline}
            self.lower_is_better |= {f"{name}/{key}" for key in result.lower_is_better}

    def tradeoff(self) -> list[Point]:
        """One point an alpha, in order; empty unless both the domain and what is to stay are evaluated."""
        domain, retention = (self._of("domain"), self._of("retention"))
        if not domain or not retention:
            return []
        return [
            Point(alpha, *(sum(own[key] for key in keys) / len(keys) for keys in (retention, domain)))
            for alpha, own in sorted(self.scores.items())
        ]

    def _of(self, role: Role) -> list[str]:
        return [key for key, own in self.roles.items() if own == role and key not in self.lower_is_better]


def best_alpha(scores: Scores, metric: str, *, lower_is_better: bool = False) -> float | None:
    """The alpha with the best `metric`; of equals the smallest, which forgets least. None where it is undefined."""
    sign = -1 if lower_is_better else 1
    defined = [alpha for alpha in sorted(scores) if not math.isnan(scores[alpha][metric])]
    return max(defined, key=lambda alpha: sign * scores[alpha][metric], default=None)


def draw(sweep: Sweep) -> bytes:
    """A PNG: the domain against retention where both are evaluated, a point an alpha; then each headline metric."""
    points = sweep.tradeoff()
    panels = len(sweep.roles) + bool(points)
    rows, columns = -(-panels // _COLUMNS), min(panels, _COLUMNS)
    figure = Figure(figsize=(3.6 * columns, 3.2 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[panels:]:
        unused.set_axis_off()
    if points:
        _draw_tradeoff(axes.pop(0), points)
    alphas = sorted(sweep.scores)
    for axis, key in zip(axes, sweep.roles, strict=False):
        evaluation, metric = key.split("/", 1)
        axis.plot(alphas, [sweep.scores[alpha][key] for alpha in alphas], "o-", color=_BLUE)
        axis.set(title=evaluation, ylabel=LABELS.get(metric, metric), xlabel="alpha (0 base, 1 checkpoint)")
        axis.grid(alpha=0.3)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()


def _draw_tradeoff(axis: Axes, points: list[Point]) -> None:
    axis.plot([p.retention for p in points], [p.gain for p in points], "o-", color=_BLUE)
    for point in points:
        axis.annotate(f"{point.alpha:g}", (point.retention, point.gain), (4, 4), textcoords="offset points", fontsize=8)
    base = points[0]
    axis.axhline(base.gain, color="#888888", lw=0.8, ls=":")
    axis.axvline(base.retention, color="#888888", lw=0.8, ls=":")
    axis.set(title="gain against retention", xlabel="retention (mean of headline metrics)", ylabel="domain (mean)")
    axis.margins(0.12)
    axis.grid(alpha=0.3)
