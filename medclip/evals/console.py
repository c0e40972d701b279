"""What the terminal shows: progress while evaluating, and the headline table at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from medclip.evals.result import LABELS
from medclip.evals.run import OnProgress, Report

STYLE = {"gain": "green", "loss": "red"}
TITLES = {"domain": "domain: what was gained", "retention": "retention: what was forgotten"}


@contextmanager
def progress(console: Console | None = None) -> Iterator[Callable[[str], OnProgress]]:
    """Bars, one a checkpoint and evaluation; yields a maker of `on_progress` for a checkpoint's name."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console or Console(stderr=True)) as bars:
        tasks = {}

        def of(checkpoint: str) -> OnProgress:
            def on_progress(name: str, done: int, total: int) -> None:
                if (checkpoint, name) not in tasks:
                    tasks[checkpoint, name] = bars.add_task(f"{escape(checkpoint)} · {escape(name)}", total=total)
                bars.update(tasks[checkpoint, name], completed=done)

            return on_progress

        yield of


def headline_table(report: Report) -> Table:
    """Headline metrics of every evaluation, gain and forgetting on one screen."""
    table = Table(title=f"{100 * report.settings.level:g} % intervals, bootstrap by group")
    table.add_column("evaluation")
    table.add_column("metric")
    table.add_column("chance", justify="right")
    for model in report.checkpoints:
        table.add_column(escape(model), justify="right")
    others = list(report.checkpoints)[1:]
    for model in others:
        table.add_column(f"Δ {escape(model)}", justify="right")
        table.add_column("verdict")
    for role, title in TITLES.items():
        if not report.role(role):
            continue
        table.add_section()
        table.add_row(f"[bold]{title}[/bold]")
        for comparison in report.role(role):
            for row in comparison.headline:
                cells = [escape(comparison.name), LABELS[row.metric], _value(row.chance)]
                cells += [f"{_value(e.value)} [{_value(e.low)}, {_value(e.high)}]" for e in row.estimates.values()]
                for model in others:
                    change = row.differences[model]
                    style = STYLE.get(change.verdict, "dim")
                    cells += [f"{change.value:+.3f}", f"[{style}]{change.verdict}[/{style}]"]
                table.add_row(*cells)
    return table


def _value(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.3f}"
