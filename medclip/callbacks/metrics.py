"""Metrics as one CSV in the run folder, a row a logged step, which a resumed run continues.

Lightning's CSVLogger deletes the file of the run that it resumes. Here the rows that the resumed run goes through again
are dropped when it first logs, and new rows follow the old.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only


class MetricsCsv(Logger):
    """Writes `save_dir/metrics.csv`: `step` first, then a column a metric, empty where a row has none."""

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self._folder = Path(save_dir)
        self.path = self._folder / "metrics.csv"
        self._columns: list[str] | None = None

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self._folder)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The run folder has `config.yaml` already."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"step": int(step or 0), **metrics}
        if self._columns is None:
            self._open(before=row["step"])
        assert self._columns is not None
        if new := [name for name in row if name not in self._columns]:
            self._columns += new
            self._rewrite(self._read())
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _open(self, before: int) -> None:
        rows = [row for row in self._read() if int(row["step"]) < before]
        self._columns = list(rows[0]) if rows else ["step"]
        self._rewrite(rows)

    def _read(self) -> list[dict[str, str]]:
        if not self.path.is_file():
            return []
        lines = self.path.read_text().splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()  # a run was killed amid this row
        return list(csv.DictReader(lines))

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        assert self._columns is not None
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        self._folder.mkdir(parents=True, exist_ok=True)
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        part.replace(self.path)
