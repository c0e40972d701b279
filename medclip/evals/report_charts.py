"""Where the report's marks go: shares of a drawing's width, or points of a polyline; nothing here knows of HTML."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from medclip.evals.bootstrap import Estimate

RIM = 100.0  # radius of a radar, in its own units
MOST_POINTS = 60  # of a drawn recall curve
STEPS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)  # ends of an axis that read well


def points(curve: Iterable[tuple[float, float]]) -> str:
    """A polyline's points on a square of 100 with its origin at the top left, from ones between 0 and 1."""
    return " ".join(f"{100 * x:.1f},{100 - 100 * y:.1f}" for x, y in curve)


def end_of_axis(values: Iterable[float]) -> float:
    """The least of `STEPS` that holds the largest of `values`; larger ones end in whole numbers. NaN is passed over."""
    largest = max((abs(v) for v in values if v == v), default=0.0)
    return next((step for step in STEPS if largest <= step), float(math.ceil(largest)))


def range_of_axis(values: Iterable[float]) -> tuple[float, float]:
    """Twentieths around `values`, within 0 and 1, at least a tenth apart."""
    known = [v for v in values if v == v] or [0.0, 1.0]
    low, high = math.floor(round(20 * min(known), 6)) / 20, math.ceil(round(20 * max(known), 6)) / 20
    if high - low < 0.1:
        low, high = max(0.0, low - 0.05), min(1.0, high + 0.05)
    return low, high


def share(value: float, low: float, high: float) -> float:
    """Per cent of the way from `low` to `high`, held between 0 and 100."""
    return round(min(max(100 * (value - low) / (high - low), 0.0), 100.0), 2)


@dataclass(frozen=True)
class Radar:
    """A radar's marks, its centre at (0, 0), its rim at `RIM`; polygons as their points, areas as paths (even-odd)."""

    top: float  # what the rim stands for
    web: list[str]
    spokes: list[tuple[float, float]]
    names: list[tuple[str, float, float, str]]  # name of an axis, where it is written, its text-anchor
    shapes: list[tuple[str, str | None]]  # of each series: its polygon, and its interval's area where all are known


def radar(names: Sequence[str], series: Sequence[Sequence[Estimate]]) -> Radar:
    """A corner an axis, the first straight up, then clockwise; `series[s][axis]`. NaN is drawn at the centre."""
    top = end_of_axis(x for own in series for e in own for x in (e.value, e.high))
    shapes = []
    for own in series:
        low, value, high = ([getattr(e, name) / top for e in own] for name in ("low", "value", "high"))
        area = None
        if not any(math.isnan(x) for x in (*low, *high)):
            area = " ".join("M" + " L".join(_corners(side)) + " Z" for side in (high, low))
        shapes.append((" ".join(_corners(value)), area))
    count = len(names)
    places = [_on_circle(k, count, 1.1) for k in range(count)]
    return Radar(
        top,
        [" ".join(_corners([part] * count)) for part in (0.25, 0.5, 0.75, 1.0)],
        [_on_circle(k, count, 1.0) for k in range(count)],
        [
            (name, x, round(y + 4, 1), "middle" if abs(x) < RIM / 4 else "start" if x > 0 else "end")
            for name, (x, y) in zip(names, places, strict=True)
        ],
        shapes,
    )


def _corners(shares: Sequence[float]) -> list[str]:
    around = (_on_circle(k, len(shares), min(max(v, 0.0), 1.0) if v == v else 0.0) for k, v in enumerate(shares))
    return [f"{x},{y}" for x, y in around]


def _on_circle(place: int, count: int, radius: float) -> tuple[float, float]:
    angle = 2 * math.pi * place / count
    return round(RIM * radius * math.sin(angle), 1), round(-RIM * radius * math.cos(angle), 1)


def swarm(values: Sequence[float], low: float, high: float, width: float = 1.6) -> list[tuple[float, int]]:
    """(per cent, row) of each value, in their order: dots nearer than `width` per cent go to rows 1, -1, 2, -2…"""
    placed: list[tuple[float, int]] = [(0.0, 0)] * len(values)
    last: dict[int, float] = {}  # row -> the place of its last dot
    for i in sorted(range(len(values)), key=lambda i: values[i]):
        place = share(values[i], low, high)
        row = next(row for row in _outward() if place - last.get(row, -math.inf) >= width)
        last[row] = place
        placed[i] = (place, row)
    return placed


def _outward() -> Iterator[int]:
    yield 0
    step = 1
    while True:
        yield step
        yield -step
        step += 1


def recall_curve(ranks: Int[np.ndarray, " n"], items: int, most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """Recall at k, at up to `most` k: across log k as a share of the way from 1 to `items`, up the ranks within k."""
    if items < 2:
        return []
    at = np.unique(np.geomspace(1, items, most).round().astype(int))
    found = np.searchsorted(np.sort(ranks), at, side="right") / len(ranks)
    return list(zip((np.log(at) / math.log(items)).tolist(), found.tolist(), strict=True))
