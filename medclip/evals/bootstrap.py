"""Bootstrap by group: patients (cases, slides) are drawn, not images, since images of one patient resemble each other.

A resample draws as many groups as there are, with replacement (Efron & Tibshirani 1993, cluster bootstrap); each sample
then weighs as often as its group was drawn. The draws depend on the groups and the seed alone, so two checkpoints that
are judged on the same samples see the same resamples, and the difference of their values, draw by draw, is the paired
bootstrap. Intervals are percentile intervals; with few groups (under about 20) they are too narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

Values = Callable[[Float[np.ndarray, "b n"]], dict[str, Float[np.ndarray, " b"]]]
Verdict = Literal["gain", "loss", "no change beyond chance"]
CHUNK_CELLS = 1 << 22  # weights held at once: 32 MiB


@dataclass(frozen=True)
class Estimate:
    """A value with its percentile interval; NaN bounds where there is a single group and so nothing to resample."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Estimate):
    """Adapted minus base: its paired interval, two-sided bootstrap p-value, and what it amounts to."""

    p: float
    verdict: Verdict


@dataclass(frozen=True)
class Bootstrap:
    """How uncertainty is measured: how many resamples, at what level, from which seed."""

    samples: int = 1000
    level: float = 0.95
    seed: int = 0


def group_weights(
    groups: Sequence[str], samples: int, seed: int, chunk_cells: int = CHUNK_CELLS
) -> Iterator[Float[np.ndarray, "b n"]]:
    """Weights of `samples` resamples by group, a few rows at a time; the same rows whatever the chunk."""
    names, group_of = np.unique(np.asarray(groups), return_inverse=True)
    total = len(names)
    rng = np.random.default_rng(seed)
    step = max(1, chunk_cells // max(1, len(group_of)))
    for start in range(0, samples, step):
        rows = min(step, samples - start)
        drawn = rng.integers(0, total, size=(rows, total)) + total * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * total).reshape(rows, total)
        yield counts[:, group_of].astype(np.float64)


def draws(values: Values, groups: Sequence[str], settings: Bootstrap) -> dict[str, Float[np.ndarray, " samples"]]:
    """Every metric on every resample; empty when there are fewer than two groups."""
    if len(set(groups)) < 2:
        return {}
    chunks = [values(weights) for weights in group_weights(groups, settings.samples, settings.seed)]
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]} if chunks else {}


def interval(drawn: Float[np.ndarray, " samples"] | None, level: float) -> tuple[float, float]:
    """Percentile interval over the resamples in which the metric is defined; NaN if there are none."""
    defined = drawn[~np.isnan(drawn)] if drawn is not None else np.empty(0)
    if not len(defined):
        return float("nan"), float("nan")
    low, high = np.percentile(defined, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def difference(
    base: float,
    adapted: float,
    base_draws: Float[np.ndarray, " samples"] | None,
    adapted_draws: Float[np.ndarray, " samples"] | None,
    level: float,
    lower_is_better: bool = False,
) -> Difference:
    """Paired difference of one metric; a gain or a loss only where its interval leaves out 0.

    p = 2 min(share of draws <= 0, share of draws >= 0), each with one added to count and total, so never 0.
    """
    paired = adapted_draws - base_draws if base_draws is not None and adapted_draws is not None else None
    low, high = interval(paired, level)
    if paired is None or not (low > 0 or high < 0):
        verdict: Verdict = "no change beyond chance"
    else:
        verdict = "gain" if (low > 0) != lower_is_better else "loss"
    return Difference(adapted - base, low, high, _p_value(paired), verdict)


def _p_value(paired: np.ndarray | None) -> float:
    defined = paired[~np.isnan(paired)] if paired is not None else np.empty(0)
    if not len(defined):
        return float("nan")
    below, above = (defined <= 0).sum() + 1, (defined >= 0).sum() + 1
    return float(min(1.0, 2 * min(below, above) / (len(defined) + 1)))
