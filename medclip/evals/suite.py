"""Suites: one average over many tasks, over the tasks of each domain, and over the core, with intervals.

Every task weighs the same, whatever its size, and counts by one number: `Suite.metric` of a classification, accuracy of
closed questions, macro AUROC of a multi-label classification, R@1 averaged over both directions of a retrieval
(DataComp's rule, arXiv:2304.14108, appendix N). The core are the tasks whose images no training set that
this house has a reader for is known to hold; an average that is higher outside of it may be memory.

Intervals: tasks are samples of their own, so the mean's bootstrap draws one resample a task, each by itself.
The resamples that the tasks' own intervals come from are reused, each task's in an order of its own that is the same
for every checkpoint; so the difference to the base stays paired.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from medclip.evals.bootstrap import Bootstrap, Difference, Estimate, difference, interval
from medclip.evals.compare import Comparison
from medclip.types import UserError

METRICS = ("acc1", "mean_per_class_recall", "macro_f1", "auroc")  # of a classification, that a suite may average
_MAIN = {
    "closed_questions": ("acc1",),
    "multilabel_classification": ("auroc",),
    "zeroshot_retrieval": ("text_retrieval_recall@1", "image_retrieval_recall@1"),
}


@dataclass(frozen=True)
class Suite:
    """Which tasks are averaged.

    Args:
        name: of the suite.
        tasks: names of the evaluations, all of them.
        metric: by which a classification counts, one of `METRICS`.
        core: those of `tasks` that are its core; () where that is not said.
    """

    name: str
    tasks: tuple[str, ...]
    metric: str = "acc1"
    core: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise UserError(f"suites.{self.name}.metric={self.metric}: choose one of {', '.join(METRICS)}")
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise UserError(f"suites.{self.name}.tasks={list(self.tasks)}: name each evaluation once, at least one")


@dataclass(frozen=True)
class Mean:
    """The unweighted mean over `tasks`, by checkpoint; `differences` to the base, of all others."""

    tasks: list[str]
    estimates: dict[str, Estimate]
    differences: dict[str, Difference]


@dataclass(frozen=True)
class SuiteResult:
    """A suite's averages. `missing` tasks are in none of them: with any, this is no result of the suite's name."""

    name: str
    present: list[str]
    missing: list[str]
    metrics: dict[str, tuple[str, ...]]  # task -> the metrics whose mean it counts by
    overall: Mean
    domains: dict[str, Mean]
    core: Mean | None


def suite_result(suite: Suite, comparisons: Mapping[str, Comparison], settings: Bootstrap) -> SuiteResult:
    """The averages of a suite over those of its tasks that were evaluated.

    Raises:
        UserError: none was.
    """
    present = [task for task in suite.tasks if task in comparisons]
    if not present:
        raise UserError(f"suite {suite.name}: none of its {len(suite.tasks)} tasks was evaluated")
    metrics = {task: _metrics(comparisons[task], suite.metric) for task in present}
    scores = {task: _scores(comparisons[task], metrics[task], settings) for task in present}
    domains: dict[str, list[str]] = {}
    for task in present:
        domains.setdefault(comparisons[task].any_result.domain or "other", []).append(task)
    core = [task for task in present if task in suite.core]

    def mean(tasks: list[str]) -> Mean:
        return _mean({task: scores[task] for task in tasks}, settings)

    return SuiteResult(
        suite.name,
        present,
        [task for task in suite.tasks if task not in comparisons],
        metrics,
        mean(present),
        {domain: mean(tasks) for domain, tasks in domains.items()},
        mean(core) if core else None,
    )


@dataclass(frozen=True)
class _Score:
    """One task's number by one checkpoint; `draws` is None where there was nothing to resample."""

    value: float
    draws: Float[np.ndarray, " samples"] | None


def _metrics(comparison: Comparison, metric: str) -> tuple[str, ...]:
    result = comparison.any_result
    there = {row.metric for row in comparison.overall}
    main = _MAIN.get(result.task) or ((metric,) if metric in there else result.headline[:1])
    return tuple(name for name in main if name in there)


def _scores(comparison: Comparison, metrics: Sequence[str], settings: Bootstrap) -> dict[str, _Score]:
    rows = [row for row in comparison.overall if row.metric in metrics]
    scores = {}
    for model in comparison.results:
        drawn = [row.draws.get(model) for row in rows]
        known = [draws for draws in drawn if draws is not None]
        mixed = None
        if known and len(known) == len(drawn):
            # Tasks with as many groups drew the same numbers: an order of its own makes each independent.
            order = np.random.default_rng([settings.seed, zlib.crc32(comparison.name.encode())])
            mixed = np.mean(known, axis=0)[order.permutation(len(known[0]))]
        scores[model] = _Score(float(np.mean([row.estimates[model].value for row in rows])), mixed)
    return scores


def _mean(scores: Mapping[str, Mapping[str, _Score]], settings: Bootstrap) -> Mean:
    """`scores[task][checkpoint]`, base first. A task without resamples leaves the mean without an interval."""
    base, *others = next(iter(scores.values()))
    values: dict[str, float] = {}
    drawn: dict[str, np.ndarray | None] = {}
    for model in (base, *others):
        own = [by_model[model] for by_model in scores.values()]
        values[model] = float(np.mean([score.value for score in own]))
        known = [score.draws for score in own if score.draws is not None]
        drawn[model] = np.mean(known, axis=0) if len(known) == len(own) else None
    return Mean(
        list(scores),
        {model: Estimate(values[model], *interval(drawn[model], settings.level)) for model in values},
        {k: difference(values[base], values[k], drawn[base], drawn[k], settings.level) for k in others},
    )


def suite_lines(suite: SuiteResult) -> str:
    """What the terminal shows of a suite: a line an average and checkpoint."""
    title = f"suite {suite.name}: mean of {len(suite.present)} tasks"
    if suite.missing:
        title += f" of {len(suite.present) + len(suite.missing)}; INCOMPLETE, without {', '.join(suite.missing)}"
    means = {"all": suite.overall} | suite.domains | ({"core": suite.core} if suite.core is not None else {})
    lines = [title]
    for name, mean in means.items():
        for model, own in mean.estimates.items():
            interval = "" if own.low != own.low else f" [{own.low:.3f}, {own.high:.3f}]"
            change = mean.differences.get(model)
            said = "" if change is None else f"  {change.value:+.3f}, {change.verdict}"
            lines.append(f"  {name} ({len(mean.tasks)})  {model}  {own.value:.3f}{interval}{said}")
    return "\n".join(lines)
