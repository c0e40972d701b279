"""`report.html`, pages of tasks, `results.json` and tables of predictions, from a `Report`.

With up to `ONE_FILE` evaluations the report is one file that needs nothing else; with more, `report.html` holds all
results side by side and each evaluation has a page of its own in `tasks/`, so that the first one stays small.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from medclip.evals.bootstrap import Estimate
from medclip.evals.compare import Comparison, MetricRow
from medclip.evals.predictions import predictions
from medclip.evals.records import to_json
from medclip.evals.report_pages import ROLES, environment
from medclip.evals.run import Report

ONE_FILE = 6  # evaluations
NAMED = 5  # changes that a sentence of the summary names
_WORDS = (("gain", "better"), ("loss", "worse"))


def write_report(report: Report, folder: Path) -> Path:
    """Write `results.json`, the pages and what `predictions` gives into `folder`; return the first page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "results.json", to_json(report))
    for name, table in predictions(report):
        _write(folder / name, table)
    written = {_write(folder / name, text) for name, text in pages(report)}
    for old in (folder / "tasks").glob("*.html"):  # of an earlier report with other evaluations
        if old not in written:
            old.unlink()
    return folder / "report.html"


def pages(report: Report) -> Iterator[tuple[str, str]]:
    """(file name, text) of each page, the first one last: who finds it finds where it leads."""
    if len(report.comparisons) <= ONE_FILE:
        yield "report.html", render(report)
        return
    slugs = unique_slugs(report.comparisons)
    names = list(report.comparisons)
    template = environment(report, lambda name: f"{slugs[name]}.html", slugs).get_template("report_task.html.j2")
    for place, name in enumerate(names):
        before, after = names[place - 1] if place else None, names[place + 1] if place + 1 < len(names) else None
        text = template.render(comparison=report.comparisons[name], before=before, after=after, whole=False)
        yield f"tasks/{slugs[name]}.html", text
    template = environment(report, lambda name: f"tasks/{slugs[name]}.html", slugs).get_template("report.html.j2")
    yield "report.html", template.render(tallies=tallies(report), whole=False)


def render(report: Report) -> str:
    """Everything as one page. Captions and names are escaped; images are data URIs; there is no script."""
    slugs = unique_slugs(report.comparisons)
    template = environment(report, lambda name: f"#eval-{slugs[name]}", slugs).get_template("report.html.j2")
    return template.render(tallies=tallies(report), whole=True)


def unique_slugs(names: Iterable[str]) -> dict[str, str]:
    """A name for files and anchors of each evaluation; no two are equal, not even where case is not told apart."""
    slugs: dict[str, str] = {}
    for name in names:
        plain = slug = re.sub(r"[^A-Za-z0-9_-]+", "-", name)[:80] or "-"
        number = 1
        while slug.lower() in {taken.lower() for taken in slugs.values()}:
            number += 1
            slug = f"{plain}-{number}"
        slugs[name] = slug
    return slugs


def summary(report: Report) -> list[str]:
    """One sentence a checkpoint and role: which headline metrics changed beyond chance; empty for a single one."""
    return [
        f"{noun}, {model} against {report.base}: {said}."
        for model, roles in tallies(report).items()
        for noun, (_, said) in roles.items()
    ]


def tallies(report: Report) -> dict[str, dict[str, tuple[tuple[int, int, int], str]]]:
    """Of each checkpoint but the base and each role: how many headline figures are a gain, neither, a loss; and which,
    in words."""
    found: dict[str, dict[str, tuple[tuple[int, int, int], str]]] = {}
    for model in list(report.checkpoints)[1:]:
        found[model] = {}
        for role, noun, _ in ROLES:
            rows = [(c, row) for c in report.role(role) for row in c.headline]
            if not rows:
                continue
            said: dict[str, list[tuple[float, str]]] = {"gain": [], "loss": [], "no change beyond chance": []}
            for comparison, row in rows:
                change = row.differences[model]
                said[change.verdict].append((abs(change.value), _change(comparison, row, change)))
            even = len(said["no change beyond chance"])
            parts = [f"{word} in {_largest(said[verdict])}" for verdict, word in _WORDS if said[verdict]]
            parts += [f"no change beyond chance in {even} of {len(rows)} headline figures"] if even else []
            counts = (len(said["gain"]), even, len(said["loss"]))
            found[model][noun.split(":")[0]] = (counts, ", and ".join(parts))
    return found


def _largest(changes: list[tuple[float, str]]) -> str:
    """All of a few in their order; the largest of many."""
    if len(changes) <= NAMED:
        return "; ".join(words for _, words in changes)
    first = sorted(changes, key=lambda change: -change[0])[:NAMED]
    return f"{'; '.join(words for _, words in first)}; and {len(changes) - NAMED} more"


def _change(comparison: Comparison, row: MetricRow, difference: Estimate) -> str:
    return f"{comparison.name} {row.label} ({difference.value:+.3f})".replace("(-", "(−")


def _write(path: Path, content: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(content, encoding="utf-8")
    part.replace(path)
    return path
