"""Where a run's time goes, as a table on the console; Lightning logs its own where nobody looks."""

from __future__ import annotations

from pytorch_lightning.profilers import SimpleProfiler
from rich.console import Console
from rich.table import Table


class TableProfiler(SimpleProfiler):
    """Lightning's simple profiler, whose longest actions are printed when training ends.

    An action's time contains that of those within it: an optimiser's step runs forwards and backwards.

    Args:
        rows: of the table.
    """

    def __init__(self, rows: int = 15) -> None:
        super().__init__()
        self.rows = rows

    def describe(self) -> None:
        """Print it, on the first rank of each machine; nothing where nothing was timed."""
        if self._local_rank in (None, 0) and self.recorded_durations:
            Console().print(profile_table(self.recorded_durations, self.rows))
        self.teardown(stage=self._stage)


def profile_table(durations: dict[str, list[float]], rows: int) -> Table:
    """The `rows` longest actions: calls, milliseconds of one, seconds of all, share of the longest."""
    totals = sorted(((sum(times), name) for name, times in durations.items() if times), reverse=True)
    longest = totals[0][0] or 1.0
    table = Table()
    table.add_column("action", overflow="fold")
    for name in ("calls", "ms each", "s in all", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    for total, name in totals[:rows]:
        calls = len(durations[name])
        cells = (f"{1e3 * total / calls:.1f}", f"{total:.2f}", f"{100 * total / longest:.1f} %")
        table.add_row(short(name), f"{calls:,}", *cells)
    return table


def short(name: str) -> str:
    """An action's name without what Lightning wraps it in: `[Callback]package.Class{…}.hook` is `Class.hook`."""
    inner = name.rpartition("]")[2]
    owner, _, hook = inner.rpartition(".")
    owner = owner.partition("{")[0].rpartition(".")[2]
    return f"{owner}.{hook}" if owner else hook
