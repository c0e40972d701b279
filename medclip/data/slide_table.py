"""Tables of patches in PathGen-1.6M's layout: which rows are of which slide, and where."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medclip.data.bad import BadSample
from medclip.data.captions import CaptionRule
from medclip.data.shards import parse_json
from medclip.data.tables import CAPTION_COLUMNS, Problems, table_rows
from slides.cohort import name_of
from slides.entry import Entry

_SLIDE_COLUMNS = ("wsi_id", "slide", "slide_id", "wsi")


def slide_rows(
    path: str, entries: Sequence[Entry], caption: CaptionRule
) -> tuple[dict[int, tuple[list[bytes], np.ndarray]], str | None, Problems]:
    """The rows of a table that can be used, by slide.

    Args:
        path: .jsonl, .json (a list), .csv, .tsv or .parquet.
        entries: the slides that there are.
        caption: decides whether a row needs a caption.

    Returns:
        For each entry's number that has rows: their JSON, and level-0 places int64 (n, 2); the caption's column, if
        there is one; (key, reason, detail) of the rows left out.

    Raises:
        UserError: the table cannot be read.
    """
    names = _names(entries)
    problems: Problems = []
    found: dict[int, list[tuple[bytes, int, int]]] = {}
    text: str | None = None
    for number, raw in enumerate(table_rows(Path(path).expanduser(), None, {*_SLIDE_COLUMNS, *CAPTION_COLUMNS}), 1):
        key = f"row {number}"
        try:
            row = parse_json(raw)
            slide = next((str(row[c]) for c in _SLIDE_COLUMNS if row.get(c) not in (None, "")), None)
            if slide is None:
                raise BadSample("missing slide", f"row {number} has none of {', '.join(_SLIDE_COLUMNS)}")
            x, y = _place(row, number)
            key = f"{slide}_{x}_{y}"
            text = text or next((column for column in CAPTION_COLUMNS if column in row), None)
            if caption.needs_text and (text is None or row.get(text) is None):
                raise BadSample("missing caption", f"row {number} has no {text or 'caption'}")
            if slide not in names:
                raise BadSample("missing slide", f"{slide} is not among the slides of slides.root")
        except BadSample as failure:
            problems.append((key, failure.reason, failure.detail))
            continue
        found.setdefault(names[slide], []).append((raw, x, y))
    packed = {k: ([raw for raw, _, _ in rows], np.array([(x, y) for _, x, y in rows])) for k, rows in found.items()}
    return packed, text, problems


def _names(entries: Sequence[Entry]) -> dict[str, int]:
    """What a slide may be called: its name in the cohort, else its file with or without ending, where that is one's."""
    names = {entry.slide: number for number, entry in enumerate(entries)}
    files = [(file, number) for number, entry in enumerate(entries) for file in _file_names(entry)]
    count = Counter(file for file, _ in files)
    return {file: number for file, number in files if count[file] == 1} | names


def _file_names(entry: Entry) -> set[str]:
    path = Path(entry.path)
    return {path.name, name_of(path)}


def _place(row: Mapping[str, Any], number: int) -> tuple[int, int]:
    """Level-0 x and y of a row: numbers, or text as PathGen-1.6M has it."""
    given = row.get("position", [row.get("x"), row.get("y")])
    if isinstance(given, str):
        given = re.split(r"[\s,;]+", given.strip("[]() "))
    try:
        x, y = (float(value) for value in given)
        return int(x), int(y)
    except (TypeError, ValueError, OverflowError):
        detail = f"row {number} has {str(given)[:60]} as its position, not [x, y]"
        raise BadSample("missing position", detail) from None
