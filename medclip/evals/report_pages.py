"""What the report's templates may ask for: numbers as text, and where a drawing's marks go."""

from __future__ import annotations

import math
import statistics
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from medclip.evals import report_charts as charts
from medclip.evals.bootstrap import Estimate
from medclip.evals.calibration import Bin
from medclip.evals.compare import Comparison, MetricRow
from medclip.evals.mil_details import MilDetails, SurvivalCurve
from medclip.evals.result import (
    LABELS,
    ClassificationDetails,
    ClosedQuestionsDetails,
    FewShotDetails,
    MultiLabelDetails,
    PromptScore,
    RetrievalDetails,
)
from medclip.evals.retrieval import RetrievalOutcomes
from medclip.evals.run import Report
from medclip.evals.slide import SlideDetails
from medclip.evals.suite import Mean, SuiteResult
from medclip.evals.vqa_controls import controls
from medclip.evals.vqa_details import VqaDetails

ROLES = (
    ("domain", "Gain: the domain", "What the adaptation was for: a gain is hoped for here."),
    ("retention", "Forgetting: what it knew before", "General tasks the base could do: a loss here is forgetting."),
)
TASKS = {
    "zeroshot_classification": "Zero-shot classification",
    "zeroshot_retrieval": "Image↔text retrieval",
    "zeroshot_slides": "Zero-shot classification of slides",
    "slide_retrieval": "Retrieval of slides",
    "slide_maps": "Text maps against masks",
    "perceptionclip": "Zero-shot classification given inferred circumstances",
    "multilabel_classification": "Multi-label classification",
    "closed_questions": "Closed questions",
    "linear_probe": "Linear probe",
    "few_shot": "Few-shot classification",
    "visual_question_answering": "Questions about images",
    "slides": "Slides from bags of features",
}
PARTS = {  # how an evaluation's details are laid out; one without any is its metrics alone
    ClassificationDetails: "report_classification.html.j2",
    SlideDetails: "report_classification.html.j2",
    RetrievalDetails: "report_retrieval.html.j2",
    MultiLabelDetails: "multilabel.html.j2",
    ClosedQuestionsDetails: "report_questions.html.j2",
    FewShotDetails: "report_few_shot.html.j2",
    VqaDetails: "report_vqa.html.j2",
    MilDetails: "report_mil.html.j2",
}
DOT, REACH = 9.0, 36.0  # of a strip plot, in pixels: between two rows of dots, and of all rows to one side


def environment(report: Report, link: Callable[[str], str], slugs: Mapping[str, str]) -> Environment:
    """The templates with all they use but a page's own variables; `link` leads to an evaluation by its name."""
    found = Environment(
        loader=PackageLoader("medclip.evals", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    found.globals.update(
        report=report,
        others=list(report.checkpoints)[1:],
        roles=ROLES,
        labels=LABELS,
        tasks=TASKS,
        link=link,
        anchor=lambda name: f"eval-{slugs[name]}",
    )
    found.filters.update(
        b64=lambda data: b64encode(data).decode(),
        num=_number,
        signed=_signed,
        bounds=_bounds,
        end=lambda value: f"{value:+.2g}".replace("-", "−"),
        pvalue=lambda p: "" if p != p else ("p < 0.01" if p < 0.01 else f"p = {p:.2f}"),
        x=lambda value: round(4 + 192 * min(max(value, 0.0), 1.0), 1),
        share=charts.share,
        points=charts.points,
        spread=_spread,
        mean_of=lambda values, places: statistics.fmean(values[i] for i in places) if places else math.nan,
        bin_points=lambda bins: charts.points((b.predicted, b.observed) for b in bins),
        bin_dots=_bin_dots,
        bins_of=lambda series, place: [own.bins if i == place else [] for i, own in enumerate(series)],
        metric_label=lambda metric: LABELS.get(metric, metric),
        part=lambda details: PARTS.get(type(details), ""),
        by_domain=_by_domain,
        changes_of=_changes,
        strip_plot=_strips,
        recall_curves=_recall_curves,
        shot_curves=_shot_curves,
        vqa_controls=lambda comparison: controls(comparison, report.settings.level),
        survival_steps=_survival_steps,
        over_folds=_over_folds,
        averages=_averages,
        top_of=lambda means: charts.end_of_axis(x for mean in means for e in mean.estimates.values() for x in _ends(e)),
        radar=_radar,
    )
    return found


@dataclass(frozen=True)
class Changes:
    """Rows of a drawing of differences: (evaluation, its first headline metric), and its axis from `low` to `high`."""

    rows: list[tuple[str, MetricRow]]
    low: float
    high: float


@dataclass(frozen=True)
class Strip:
    """A checkpoint's row of a strip plot: dots (per cent across, pixels down, words), and where the ensemble stands."""

    dots: list[tuple[float, float, str]]
    at: float | None
    ensemble: float
    lowest: float
    highest: float
    height: int


@dataclass(frozen=True)
class Strips:
    """A strip plot from `low` to `high`, a row a checkpoint; `chance` in per cent across, None where it is outside."""

    rows: dict[str, Strip]
    low: float
    high: float
    chance: float | None


def _by_domain(comparisons: Sequence[Comparison]) -> dict[str, list[Comparison]]:
    domains: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        domains.setdefault(comparison.any_result.domain or "other", []).append(comparison)
    return domains


def _changes(comparisons: Sequence[Comparison]) -> Changes:
    """Largest gain of the first other checkpoint first; metrics that a scale from 0 to 1 cannot hold are left out."""
    rows = [(c.name, c.headline[0]) for c in comparisons if c.headline]
    rows = [(name, row) for name, row in rows if row.on_unit_scale and row.differences]
    rows.sort(key=lambda pair: -_known(next(iter(pair[1].differences.values())).value))
    bounds = [x for _, row in rows for d in row.differences.values() for x in (*_ends(d), d.low)]
    low, high = (charts.end_of_axis(x for x in bounds if sign * x > 0) for sign in (-1, 1))
    return Changes(rows, -max(low, high / 8), max(high, low / 8))


def _strips(comparison: Comparison) -> Strips:
    scores: dict[str, list[PromptScore]] = {}
    ensembles: dict[str, float] = {}
    for model, result in comparison.results.items():
        assert isinstance(result.details, ClassificationDetails)
        scores[model] = result.details.prompts
        ensembles[model] = result.metrics["mean_per_class_recall"]
    chance = comparison.any_result.chance.get("mean_per_class_recall")
    alone = {model: [p.mean_per_class_recall for p in own] for model, own in scores.items()}
    low, high = charts.range_of_axis([*ensembles.values(), *(v for own in alone.values() for v in own)])
    rows = {}
    for model, own in alone.items():
        placed = charts.swarm(own, low, high)
        rows_aside = max(abs(row) for _, row in placed)
        pitch = min(DOT, REACH / max(rows_aside, 1))
        middle = round(pitch * rows_aside + DOT)
        words = [f"{p.template}: {_number(p.mean_per_class_recall)}" for p in scores[model]]
        dots = [(x, round(middle + pitch * row, 1), said) for (x, row), said in zip(placed, words, strict=True)]
        ensemble = ensembles[model]
        at = charts.share(ensemble, low, high) if ensemble == ensemble else None
        rows[model] = Strip(dots, at, ensemble, min(own), max(own), 2 * middle)
    at = charts.share(chance, low, high) if chance is not None and low <= chance <= high else None
    return Strips(rows, low, high, at)


def _recall_curves(comparison: Comparison) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Direction -> checkpoint -> its curve; empty where there are too few items to draw one."""
    sides: dict[str, dict[str, list[tuple[float, float]]]] = {"image→text": {}, "text→image": {}}
    for model, result in comparison.results.items():
        own, details = result.outcomes, result.details
        assert isinstance(own, RetrievalOutcomes) and isinstance(details, RetrievalDetails)
        sides["image→text"][model] = charts.recall_curve(own.text_rank, details.distinct_captions)
        sides["text→image"][model] = charts.recall_curve(own.image_rank, details.images)
    return {side: curves for side, curves in sides.items() if all(curves.values())}


@dataclass(frozen=True)
class ShotCurve:
    """A checkpoint's curve over shots on a square of 1, its draws, and the height of prompts alone on one of 100."""

    mean: list[tuple[float, float]]
    draws: list[tuple[float, float]]
    zero: float


@dataclass(frozen=True)
class ShotCurves:
    """Method -> checkpoint -> curve, over these shots, from `low` to `high`."""

    methods: dict[str, dict[str, ShotCurve]]
    shots: list[int]
    low: float
    high: float


def _shot_curves(comparison: Comparison) -> ShotCurves:
    details = {model: result.details for model, result in comparison.results.items()}
    own = {model: found for model, found in details.items() if isinstance(found, FewShotDetails)}
    rows = [row for found in own.values() for row in found.rows]
    low, high = charts.range_of_axis([*(x for r in rows for x in r.draws), *(f.zero_shot for f in own.values())])
    shots = sorted({row.shots for row in rows})

    def across(count: int) -> float:
        return math.log(count / shots[0]) / math.log(shots[-1] / shots[0]) if len(shots) > 1 else 0.5

    def up(value: float) -> float:
        return charts.share(value, low, high) / 100

    def curve(found: FewShotDetails, method: str) -> ShotCurve:
        of_method = [row for row in found.rows if row.method == method]
        mean = [(across(row.shots), up(row.mean)) for row in of_method]
        draws = [(across(row.shots), up(x)) for row in of_method for x in row.draws]
        return ShotCurve(mean, draws, round(100 - 100 * up(found.zero_shot), 2))

    methods = dict.fromkeys(row.method for row in rows)
    return ShotCurves({m: {k: curve(found, m) for k, found in own.items()} for m in methods}, shots, low, high)


def _survival_steps(curves: Sequence[SurvivalCurve], longest: float) -> list[list[tuple[float, float]]]:
    """Each curve on a square of 1: flat until an event, then down."""
    drawn = []
    for curve in curves:
        steps = [(time / longest if longest else 0.0, share) for time, share in curve.steps]
        corners = [(x, before) for (_, before), (x, _) in pairwise(steps)]
        drawn.append([steps[0], *(point for pair in zip(corners, steps[1:], strict=True) for point in pair)])
    return drawn


def _over_folds(details: MilDetails, metric: str) -> tuple[float, float]:
    """Mean and standard deviation (n - 1) of a metric over the folds in which it is defined."""
    known = [row.values[metric] for row in details.folds if not math.isnan(row.values.get(metric, math.nan))]
    mean = statistics.fmean(known) if known else math.nan
    return mean, statistics.stdev(known) if len(known) > 1 else math.nan


def _averages(suite: SuiteResult) -> dict[str, Mean]:
    core = {"core": suite.core} if suite.core is not None else {}
    domains = suite.domains if len(suite.domains) > 1 else {}
    return {"all": suite.overall} | domains | core


def _radar(suite: SuiteResult) -> charts.Radar:
    models = list(suite.overall.estimates)
    return charts.radar(list(suite.domains), [[m.estimates[k] for m in suite.domains.values()] for k in models])


def _bin_dots(bins: Sequence[Bin]) -> list[tuple[float, float, float]]:
    """Where each bin's dot stands on a square of 100, and its radius: its area grows with the samples."""
    most = max(b.count for b in bins)
    return [
        (round(100 * b.predicted, 1), round(100 - 100 * b.observed, 1), round(1 + 2.6 * (b.count / most) ** 0.5, 2))
        for b in bins
    ]


def _ends(estimate: Estimate) -> Iterable[float]:
    return estimate.value, estimate.high


def _known(value: float) -> float:
    return value if value == value else -math.inf


def _number(value: float | None) -> str:
    if value is None or value != value:
        return "–"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _signed(value: float) -> str:
    if value != value:
        return "–"
    return (f"{value:+.3f}" if abs(value) < 10 else f"{value:+.1f}").replace("-", "−")


def _bounds(estimate: Estimate) -> str:
    return (
        "" if estimate.low != estimate.low else f"[{_number(estimate.low)}, {_number(estimate.high)}]".replace("-", "−")
    )


def _spread(prompts: Sequence[PromptScore]) -> dict[str, Any]:
    scores = [p.mean_per_class_recall for p in prompts]
    return {
        "mean": statistics.fmean(scores),
        "sd": statistics.stdev(scores) if len(scores) > 1 else 0.0,
        "min": min(scores),
        "max": max(scores),
        "best": max(prompts, key=lambda p: p.mean_per_class_recall).template,
    }
