"""What became of each slide: a row, kept in OUT/state as it is done, and all of them as OUT/manifest.csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from slides.entry import Entry
from slides.files import write_whole

FIRST = ("slide", "status", "patches", "corrupt", "sparse", "seconds", "reason", "path")


def done_rows(state: Path) -> dict[str, dict[str, Any]]:
    """Rows of all slides that any run has finished here, failed ones too."""
    rows = {}
    for path in sorted(state.glob("*.json")):
        try:
            row = orjson.loads(path.read_bytes())
        except (OSError, orjson.JSONDecodeError):
            continue
        if isinstance(row, dict) and "slide" in row:
            rows[row["slide"]] = row
    return rows


def write_manifest(
    folder: Path, entries: Sequence[Entry], more: Mapping[str, Mapping[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """OUT/manifest.csv: what is done, then what is not (`pending`), in the order of the cohort.

    Args:
        folder: OUT.
        entries: of this run; slides that other runs wrote here come after them.
        more: rows of this run that no file may hold, which go first: busy slides, processes that died.

    Returns:
        The rows of `entries`.
    """
    done = done_rows(folder / "state")
    rows = []
    for entry in entries:
        row = dict((more or {}).get(entry.slide, {})) or done.get(entry.slide)
        done.pop(entry.slide, None)
        rows.append(row or {"slide": entry.slide, "path": entry.path, "status": "pending"})
    for row in (*rows, *done.values()):
        row.pop("table", None)  # the columns of the user's own table, which are for index.parquet
    everything = rows + list(done.values())
    columns = list(dict.fromkeys([*FIRST, *(name for row in everything for name in row)]))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(everything)
    write_whole(folder / "manifest.csv", text.getvalue().encode())
    return rows
