"""Tables as sources: a CSV, TSV, Excel, JSONL, JSON or parquet file that names images and captions.

Each row of a table is kept as its JSON text, in one blob. Columns are found by their usual names (ROCO: `name` and
`caption`; ROCOv2: `ID` and `Caption`; PMC-OA: `image` and `caption`) or named in the config. A table is not trusted:
its image paths must end up inside the image root, after every `..` and symbolic link.
"""

from __future__ import annotations

import csv
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pandas as pd

from medclip.data.bad import BadSample
from medclip.data.captions import CaptionRule
from medclip.data.index import digest, fingerprint
from medclip.data.inside import read_inside
from medclip.data.packed import Packed
from medclip.data.raw import RawSample
from medclip.data.reshape import PATH, Reshape
from medclip.data.shards import parse_json
from medclip.types import UserError

_IMAGE_COLUMNS = ("image", "image_path", "filepath", "file_path", "file_name", "filename", "path", "name", "ID")
CAPTION_COLUMNS = ("caption", "Caption", "text", "captions", "title")
_KEY_COLUMNS = ("key", "id", "ID", "uid")
_TEXT_COLUMNS = (*_IMAGE_COLUMNS, *CAPTION_COLUMNS, *_KEY_COLUMNS)  # names, even where they look like numbers
_PLACE = "image_place"  # the column of a path that was searched for
_LOOK = 100  # rows looked at for their columns
_MOST_SHEET_BYTES = 256 << 20
Problems = list[tuple[str, str, str]]


@dataclass(frozen=True)
class TableSource:
    """Rows of a table with the images they name.

    Args:
        name: in messages and reports.
        root: absolute folder, links resolved, that every image must lie in.
        table: one JSON object a row.
        keys: one a row.
        rows: int64, numbers of the rows that are in.
        image: column of the image's path relative to `root`.
        text: column of the caption, or None.
        suffix: appended to the image's path.
        caption: how captions are made.
        weight: passes per epoch.
        problems: (key, reason, detail) of rows left out.
    """

    name: str
    root: str
    table: Packed
    keys: Packed
    rows: np.ndarray
    image: str
    text: str | None
    suffix: str = ""
    caption: CaptionRule = field(default_factory=CaptionRule)
    weight: float = 1.0
    problems: Problems = field(default_factory=list)

    @property
    def chunks(self) -> np.ndarray:
        return np.arange(len(self.rows), dtype=np.int64)  # files lie where they lie: a row is read by itself

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, i: int) -> str:
        return self.keys[int(self.rows[i])]

    def read(self, i: int, *, want_meta: bool = False) -> RawSample:
        meta = self._row(i)
        data = read_inside(self.root, str(meta[self.image]) + self.suffix)
        return RawSample(self.key(i), data, self._text(meta), meta)

    def fields(self, i: int) -> dict[str, Any]:
        meta = self._row(i)
        return {"key": self.key(i), "caption": self._text(meta)} | meta

    def extents(self, i: int) -> tuple[str, int, int] | None:
        return None

    def select(self, rows: np.ndarray) -> TableSource:
        return replace(self, rows=self.rows[rows])

    def fingerprint(self) -> str:
        return fingerprint([self.root, digest(self.table.blob), digest(self.rows)])

    def _row(self, i: int) -> dict[str, Any]:
        return parse_json(self.table.bytes(int(self.rows[i])))

    def _text(self, meta: Mapping[str, Any]) -> str | list[str] | None:
        value = meta.get(self.text) if self.text is not None else None
        if isinstance(value, list):
            return [str(text) for text in value if text is not None]
        return None if value is None else str(value)


def open_table(
    name: str,
    path: str,
    caption: CaptionRule,
    weight: float = 1.0,
    *,
    image_root: str | None = None,
    columns: Mapping[str, str] | None = None,
    header: Sequence[str] | None = None,
    suffix: str = "",
    separator: str | None = None,
    search: bool = False,
    **reshape: Any,
) -> TableSource:
    """A table as a source; every row becomes one sample.

    Args:
        name: of the source.
        path: .csv, .tsv, .txt (tab-separated), each also as .gz, .xlsx (its first sheet), .jsonl, .json (a list) or
            .parquet.
        caption: how captions are made.
        weight: passes per epoch.
        image_root: folder that the image paths are relative to; the table's own folder if None.
        columns: {image, text, key}: which columns these are, where their names are not the usual ones.
        header: column names of a CSV or TSV without a header line.
        suffix: appended to the image column, where it holds names without an ending (ROCOv2's `ID`).
        separator: between the columns of a CSV or text file, where it is not the usual one (COVIDx: a space).
        search: the image column holds file names, which lie in whatever folders below `image_root` (ChestX-ray14).
        **reshape: see `reshape`.

    Raises:
        UserError: an unreadable table, no such column, or no usable row.
    """
    columns = dict(columns or {})
    if unknown := set(columns) - {"image", "text", "key"}:
        raise UserError(f"source {name}: columns has unknown keys {sorted(unknown)}: use image, text and key")
    root = os.path.realpath(Path(image_root).expanduser() if image_root else Path(path).expanduser().parent)
    if not Path(root).is_dir():
        raise UserError(f"source {name}: image folder {root} is not there: set image_root")
    problems: Problems = []
    kept: list[bytes] = []
    keys: list[str] = []
    if reshape.get("image_path") is not None:
        columns.setdefault("image", PATH)
    shape = Reshape(name, lambda other, texts: table_rows(other, None, texts), **reshape)
    texts = {*_TEXT_COLUMNS, *columns.values(), *shape.texts}
    rows = shape(table_rows(Path(path).expanduser(), header, texts, separator))
    places = _files_below(root) if search else None
    first = list(islice(rows, _LOOK))
    if not (there := _columns(first)):
        raise UserError(f"source {name}: table {path} has no usable row: check that it is not empty")
    image = _column(name, there, columns.get("image"), _IMAGE_COLUMNS, "image")
    key = _column(name, there, columns.get("key"), _KEY_COLUMNS)
    text = _column(name, there, columns.get("text"), CAPTION_COLUMNS, "text" if caption.needs_text else None)
    for number, raw in enumerate(chain(first, rows), 1):
        try:
            row = parse_json(raw)
        except BadSample as failure:
            problems.append((f"row {number}", failure.reason, failure.detail))
            continue
        value = row.get(image or "")
        label = next((str(v) for v in (row.get(key or ""), value) if v is not None and v != ""), f"row {number}")
        if isinstance(value, bool | float | list | dict) or value is None or value == "":
            problems.append((label, "missing image", f"row {number} has no {image}"))
        elif places is not None and len(lying := places.get(f"{value}{suffix}", [])) != 1:
            found = f"is in {len(lying)} folders" if lying else "is in no folder"
            problems.append((label, "missing image", f"{value}{suffix} {found} below {root}"))
        elif caption.needs_text and (text is None or row.get(text) is None):
            problems.append((label, "missing caption", f"row {number} has no {text}"))
        else:
            kept.append(raw if places is None else orjson.dumps(row | {_PLACE: places[f"{value}{suffix}"][0]}))
            keys.append(label)
    if places is not None:
        image, suffix = _PLACE, ""
    if not kept or image is None:
        raise UserError(f"source {name}: table {path} has no usable row ({len(problems)} are bad): check its columns")
    packed = Packed.of(kept), Packed.of(keys), np.arange(len(kept))
    return TableSource(name, root, *packed, image, text, suffix, caption, weight, problems)


def _files_below(root: str) -> dict[str, list[str]]:
    """File name -> paths relative to `root`, links to folders not followed."""
    places: dict[str, list[str]] = {}
    for folder, _, files in os.walk(root):
        for file in files:
            places.setdefault(file, []).append(os.path.relpath(folder, root) + f"/{file}")
    return places


def _columns(rows: Sequence[bytes]) -> dict[str, None]:
    """The names that the rows have, in their order; a row may lack some."""
    names: dict[str, None] = {}
    for raw in rows:
        with suppress(BadSample):
            names |= dict.fromkeys(parse_json(raw))
    return names


def _column(
    source: str, row: Iterable[str], given: str | None, usual: Sequence[str], needed: str | None = None
) -> str | None:
    """The column that was named, else the first of the usual ones; an error if there is none but one is `needed`."""
    if given is not None and given not in row:
        raise UserError(f"source {source}: no column {given!r}; the columns are: {', '.join(row)}")
    found = given or next((name for name in usual if name in row), None)
    if found is None and needed is not None:
        raise UserError(
            f"source {source}: no column for the {needed}; the columns are: {', '.join(row)}: set columns.{needed}"
        )
    return found


def table_rows(
    path: Path, header: Sequence[str] | None, texts: set[str], separator: str | None = None
) -> Iterator[bytes]:
    """Each row as JSON text; the columns `texts` of a CSV stay as they are written."""
    ending = (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()
    try:
        match ending:
            case ".jsonl" | ".ndjson":
                with path.open("rb") as file:
                    yield from (line.strip().removeprefix(b"\xef\xbb\xbf") for line in file if line.strip())
            case ".json":
                rows = orjson.loads(path.read_bytes())
                if not isinstance(rows, list):
                    raise ValueError(f"a JSON {type(rows).__name__}, not a list of rows")
                yield from map(orjson.dumps, rows)
            case ".parquet":
                yield from _json_rows(pd.read_parquet(path))
            case ".csv" | ".tsv" | ".txt":
                separator = separator or ("," if ending == ".csv" else "\t")
                names: Any = list(header) if header else None
                frame: Any = pd.read_csv(
                    path,
                    sep=separator,
                    dtype=str,
                    keep_default_na=False,
                    encoding="utf-8-sig",
                    names=names,
                    # VQA-Med's bars stand between texts in which a quotation mark is just that.
                    quoting=csv.QUOTE_NONE if separator == "|" else csv.QUOTE_MINIMAL,
                    index_col=False,  # or a comma too many at the end of each line would shift all columns
                )
                yield from _json_rows(frame.apply(lambda column: _typed(column, text=column.name in texts)))
            case ".pkl" | ".pickle":
                raise UserError(
                    f"cannot read table {path}: a pickle can run any program, so none is opened: take the same data as "
                    ".parquet or .json, or, where you trust its origin, write it as .jsonl yourself"
                )
            case ".xlsx":
                frame = _first_sheet(path)
                yield from _json_rows(frame.apply(lambda column: _typed(column, text=column.name in texts)))
            case _:
                raise ValueError(f"unknown ending {ending!r}: use .csv, .tsv, .xlsx, .jsonl, .json or .parquet")
    # pandas' and pyarrow's errors are ValueErrors.
    except (OSError, ValueError, OverflowError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read table {path}: {str(error).strip()[:160]}") from error


def _first_sheet(path: Path) -> Any:
    """The first sheet of a workbook; a workbook is a zip file, which may not unfold without end."""
    with zipfile.ZipFile(path) as archive:
        if (size := sum(member.file_size for member in archive.infolist())) > _MOST_SHEET_BYTES:
            raise ValueError(f"it would unfold to {size >> 20} MB: save the sheet as .csv")
    try:
        return pd.read_excel(path, dtype=str, keep_default_na=False)
    except ImportError as error:
        raise UserError(f"table {path} needs openpyxl: pip install openpyxl, or save the sheet as .csv") from error


def _json_rows(frame: pd.DataFrame) -> Iterator[bytes]:
    for start in range(0, len(frame), 10_000):
        lines = frame.iloc[start : start + 10_000].to_json(
            orient="records", lines=True, force_ascii=False, double_precision=15, date_format="iso"
        )
        yield from lines.encode().splitlines()


def _typed(column: Any, *, text: bool) -> Any:
    """Numbers where all values are numbers, so that filters compare them as such.

    Text where one has a leading zero, or is whole with more digits than a float holds: such are names.
    """
    filled = column[column != ""]
    numbers: Any = pd.to_numeric(filled, errors="coerce")
    if text or not len(filled) or numbers.isna().any() or filled.str.match(r"^[-+]?(0\d|\d{16,}$)").any():
        return column.where(column != "", None)
    return numbers.reindex(column.index)
