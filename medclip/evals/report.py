"""`report.html` (one file that needs nothing else), `results.json` and tables of predictions, from a `Report`."""

from __future__ import annotations

import math
import os
import re
import statistics
from base64 import b64encode
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from medclip.evals.bootstrap import Estimate
from medclip.evals.compare import Comparison, MetricRow
from medclip.evals.predictions import predictions
from medclip.evals.records import to_json
from medclip.evals.result import LABELS, PromptScore
from medclip.evals.run import Report

ROLES = (
    ("domain", "Gain: the domain", "What the adaptation was for: a gain is hoped for here."),
    ("retention", "Forgetting: what it knew before", "General tasks the base could do: a loss here is forgetting."),
)
TASKS = {
    "zeroshot_classification": "Zero-shot classification",
    "zeroshot_retrieval": "Image↔text retrieval",
    "multilabel_classification": "Multi-label classification",
}


def write_report(report: Report, folder: Path) -> Path:
    """Write `results.json`, `report.html` and what `predictions` gives into `folder`; return the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "results.json", to_json(report))
    for name, table in predictions(report):
        _write(folder / name, table)
    return _write(folder / "report.html", render(report))


def render(report: Report) -> str:
    """The page as text. Captions and names are escaped; images are data URIs; there is no script."""
    environment = Environment(
        loader=PackageLoader("medclip.evals", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters.update(
        b64=lambda data: b64encode(data).decode(),
        num=_number,
        signed=_signed,
        bounds=_bounds,
        pvalue=lambda p: "" if p != p else ("p < 0.01" if p < 0.01 else f"p = {p:.2f}"),
        x=lambda value: round(4 + 192 * min(max(value, 0.0), 1.0), 1),
        anchor=lambda comparison: "eval-" + re.sub(r"[^A-Za-z0-9_-]+", "-", comparison.name),
        spread=_spread,
        points=_points,
        mean_of=lambda values, places: statistics.fmean(values[i] for i in places) if places else math.nan,
        bin_points=lambda bins: _points((b.predicted, b.observed) for b in bins),
    )
    return environment.get_template("report.html.j2").render(
        report=report,
        others=list(report.checkpoints)[1:],
        roles=ROLES,
        labels=LABELS,
        tasks=TASKS,
        summary=summary(report),
    )


def summary(report: Report) -> list[str]:
    """One sentence a checkpoint and role: which headline metrics changed beyond chance; empty for a single one."""
    lines = []
    for model in list(report.checkpoints)[1:]:
        for role, noun, _ in ROLES:
            rows = [(c, row) for c in report.role(role) for row in c.headline]
            if not rows:
                continue
            said = {"gain": [], "loss": [], "no change beyond chance": []}
            for comparison, row in rows:
                said[row.differences[model].verdict].append(_change(comparison, row, row.differences[model]))
            even = len(said["no change beyond chance"])
            parts = [f"{word} in {'; '.join(said[verdict])}" for verdict, word in _WORDS if said[verdict]]
            parts += [f"no change beyond chance in {even} of {len(rows)} headline figures"] if even else []
            lines.append(f"{noun.split(':')[0]}, {model} against {report.base}: {', and '.join(parts)}.")
    return lines


_WORDS = (("gain", "better"), ("loss", "worse"))


def _change(comparison: Comparison, row: MetricRow, difference: Estimate) -> str:
    return f"{comparison.name} {row.label} ({difference.value:+.3f})"


def _number(value: float | None) -> str:
    if value is None or value != value:
        return "–"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _signed(value: float) -> str:
    if value != value:
        return "–"
    return (f"{value:+.3f}" if abs(value) < 10 else f"{value:+.1f}").replace("-", "−")


def _bounds(estimate: Estimate) -> str:
    return "" if estimate.low != estimate.low else f"[{_number(estimate.low)}, {_number(estimate.high)}]"


def _points(curve: Iterable[tuple[float, float]]) -> str:
    """A polyline's points on a square of 100 with its origin at the top left, from ones between 0 and 1."""
    return " ".join(f"{100 * x:.1f},{100 - 100 * y:.1f}" for x, y in curve)


def _spread(prompts: Sequence[PromptScore]) -> dict[str, Any]:
    scores = [p.mean_per_class_recall for p in prompts]
    return {
        "mean": statistics.fmean(scores),
        "sd": statistics.stdev(scores) if len(scores) > 1 else 0.0,
        "min": min(scores),
        "max": max(scores),
        "best": max(prompts, key=lambda p: p.mean_per_class_recall).template,
    }


def _write(path: Path, content: str) -> Path:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(content, encoding="utf-8")
    part.replace(path)
    return path
