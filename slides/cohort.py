"""Which slides: a table, a folder, or a pattern, to entries with unique names."""

from __future__ import annotations

import csv
import glob
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import openslide

from slides.entry import Entry, plain
from slides.errors import SlideError
from slides.mpp import MAX_MPP, MIN_MPP

_log = logging.getLogger(__name__)
_SLIDES = (".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide", ".tif", ".tiff", ".dcm")
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp")  # beside slides they are labels and thumbnails: only where they are named
_PATH, _NAME = ("path", "wsi", "file", "filename"), ("slide", "slide_id")


def read_cohort(
    source: str | Sequence[str], *, mpp: float | None = None, mpp_table: Mapping[str, float] | None = None
) -> list[Entry]:
    """Slides of a CSV (a column `path`; `slide`, `mpp` and others as they are there), a folder, or patterns.

    A DICOM slide of several files counts once.

    Args:
        source: the CSV, a folder that is searched below, a file, or glob patterns (`**` allowed). PNG and JPEG count
            where a pattern or a table names them, not in a folder.
        mpp: of all slides that the table gives none.
        mpp_table: `{name or file name: mpp}`, see `mpp.read_mpp_table`.

    Raises:
        SlideError: nothing is found, a table is broken, or two slides have one name.
    """
    patterns = [source] if isinstance(source, str) else list(source)
    if len(patterns) == 1 and patterns[0].lower().endswith((".csv", ".tsv")):
        entries = _table(Path(patterns[0]).expanduser())
    else:
        entries = [Entry(name_of(path), str(path)) for path in _once(_found(patterns))]
    if not entries:
        raise SlideError(f"no slide in {', '.join(map(str, patterns))}: give a folder, a pattern or a CSV of paths")
    named = [_with_mpp(entry, mpp, mpp_table or {}) for entry in entries]
    _check_unique(named)
    return named


def name_of(path: Path) -> str:
    """A slide's name: its file's without the ending."""
    name = path.name
    for ending in (".ome.tiff", ".ome.tif"):
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return path.stem


def _with_mpp(entry: Entry, mpp: float | None, table: Mapping[str, float]) -> Entry:
    if entry.mpp is not None:
        return entry
    path = Path(entry.path)
    keys = (entry.slide, path.name, path.stem, entry.path)
    return replace(entry, mpp=next((table[key] for key in keys if key in table), mpp))


def _found(patterns: Iterable[str]) -> list[Path]:
    paths: dict[Path, None] = {}
    for pattern in patterns:
        root = Path(pattern).expanduser()
        if root.is_dir():
            matches = [path for path in sorted(root.rglob("*")) if path.suffix.lower() in _SLIDES]
        elif root.is_file():
            matches = [root]
        else:
            # A pattern may be absolute, which Path.glob does not take.
            matches = [Path(match) for match in sorted(glob.glob(str(root), recursive=True))]  # noqa: PTH207
            matches = [path for path in matches if path.suffix.lower() in (*_SLIDES, *_IMAGES)]
        for path in matches:
            if path.is_file() and not path.name.startswith("."):
                paths.setdefault(path)
    return list(paths)


def _once(paths: list[Path]) -> list[Path]:
    """DICOM files of one series are one slide: the first stands for all."""
    series: set[str] = set()
    kept = []
    for path in paths:
        if path.suffix.lower() == ".dcm":
            try:
                with openslide.OpenSlide(path) as handle:
                    uid = handle.properties.get("dicom.SeriesInstanceUID", str(path))
            except (openslide.OpenSlideError, OSError):
                uid = str(path)  # the run will say what is wrong with it
            if uid in series:
                continue
            series.add(uid)
        kept.append(path)
    return kept


def _table(path: Path) -> list[Entry]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            rows, columns = list(reader), reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SlideError(f"{path}: cannot be read as CSV ({error})") from None
    where = next((name for name in _PATH if name in columns), None)
    if where is None:
        raise SlideError(f"{path}: has the columns {', '.join(columns)}, none of them {' or '.join(_PATH)}")
    name = next((one for one in _NAME if one in columns), None)
    entries = []
    for number, row in enumerate(rows, 2):
        target = row[where]
        if not target:
            raise SlideError(f"{path}: line {number} has no {where}")
        file = path.parent / Path(target).expanduser()
        mpp = row.get("mpp")
        try:
            value = float(mpp) if mpp else None
        except ValueError:
            value = -1.0
        if value is not None and not MIN_MPP <= value <= MAX_MPP:
            raise SlideError(f"{path}: line {number} has mpp {mpp!r}: give µm a level-0 pixel, or leave it empty")
        extra = {k: v for k, v in row.items() if k and k not in (where, name, "mpp") and v not in (None, "")}
        entries.append(Entry((name and row[name]) or name_of(file), str(file), value, extra))
    return entries


def _check_unique(entries: list[Entry]) -> None:
    by: dict[str, list[str]] = defaultdict(list)
    for entry in entries:
        by[plain(entry.slide).casefold()].append(entry.path)
    for paths in by.values():
        if len(paths) > 1:
            raise SlideError(
                f"{paths[0]} and {paths[1]} would have one name: give a CSV with the columns slide (unique) and path"
            )


def take_part(entries: Sequence[Entry], number: int, parts: int) -> list[Entry]:
    """Every `parts`-th slide from `number` (from 0): an array job's share, whose union is the cohort.

    Raises:
        SlideError: no such part.
    """
    if not (isinstance(number, int) and isinstance(parts, int) and 0 <= number < parts):
        raise SlideError(f"part [{number}, {parts}]: the first number counts from 0 to one below the second")
    return list(entries[number::parts])
