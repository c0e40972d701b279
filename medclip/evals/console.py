"""What the terminal shows: progress while evaluating, and the headline table at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from medclip.evals.compare import MetricRow
from medclip.evals.run import OnProgress, Report

STYLE = {"gain": "green", "loss": "red", "no change": "dim"}
SHORT = {"no change beyond chance": "no change"}
TITLES = {"domain": "what was gained", "retention": "what was forgotten"}


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
    """Headline metrics of every evaluation, gain and forgetting on one screen; fits 80 columns for any checkpoints."""
    others = list(report.checkpoints)[1:]
    level = f"{100 * report.settings.level:g} % intervals, bootstrap by group"
    table = Table(title=level, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("evaluation", overflow="fold", min_width=18)
    table.add_column("checkpoint", overflow="ellipsis", max_width=14)
    table.add_column("value", no_wrap=True)
    if others:
        table.add_column(f"minus {escape(report.base)}", no_wrap=True, justify="right")
        table.add_column("", no_wrap=True)
    for role, title in TITLES.items():
        if not report.role(role):
            continue
        table.add_section()
        table.add_row(f"[bold]{title}[/bold]")
        for comparison in report.role(role):
            for row in comparison.headline:
                table.add_row(*(_lines(cells) for cells in _columns(comparison.name, row, others)))
    return table


def _columns(name: str, row: MetricRow, others: list[str]) -> list[list[str]]:
    """One metric's cells, each a line a checkpoint, the base first."""
    chance = f" (chance {_value(row.chance)})" if row.chance is not None else ""
    values = [f"{_value(e.value)} [{_value(e.low)}, {_value(e.high)}]" for e in row.estimates.values()]
    columns = [[f"{name}:", f"{row.label}{chance}"], list(row.estimates), values]
    if others:
        changes = [row.differences[model] for model in others]
        columns.append(["", *(f"{change.value:+.3f}" for change in changes)])
        columns.append(["", *(SHORT.get(change.verdict, change.verdict) for change in changes)])
    return columns


def _lines(cells: list[str]) -> Text:
    text = Text("\n".join(cells))
    for verdict, style in STYLE.items():
        text.highlight_regex(rf"(?m)^{verdict}$", style)
    return text


def _value(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.3f}"
