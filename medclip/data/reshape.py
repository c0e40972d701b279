"""Rows of a table brought into the form that a source wants: one row an image, with its path and all its columns.

In this order, each optional:

| option | does | for example |
|---|---|---|
| `majority: image_id` | rows of one value become one: of 0/1 columns more than half decides, else the first row | VinDr-CXR: three radiologists |
| `join: {table, by}`, or several | adds the columns of the other table's only row with the same values | MIMIC-CXR: split, labels |
| `extract: {patient: {column: Path, pattern: "patient\\\\d+"}}` | a column from what a pattern finds in another | CheXpert |
| `image_path: "files/p{subject_id:.2}/{dicom_id}.jpg"` | the image's path from columns; `:.2` is the first two characters | MIMIC-CXR |
"""  # noqa: E501  # a table's rows are lines

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Any

import orjson

from medclip.data.bad import BadSample
from medclip.data.shards import parse_json
from medclip.types import UserError

PATH = "image_path"  # the column that this option makes
Row = dict[str, Any]
Read = Callable[[Path, set[str]], Iterator[bytes]]  # a table's rows as JSON, given the columns that are text


class Reshape:
    """The options of one source.

    Args:
        name: of the source, in messages.
        read: reads the rows of a joined table.
        majority, join, extract, image_path: see above.

    Raises:
        UserError: an option of another form.
    """

    def __init__(
        self,
        name: str,
        read: Read,
        *,
        majority: str | None = None,
        join: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        extract: Mapping[str, Mapping[str, str]] | None = None,
        image_path: str | None = None,
    ) -> None:
        self.name = name
        self.read = read
        self.majority = majority
        self.joins = [_join(name, one) for one in ([join] if isinstance(join, Mapping) else join or [])]
        self.extract = _extract(name, extract or {})
        self.path = image_path
        self.path_columns = _placeholders(name, image_path) if image_path is not None else []

    @property
    def texts(self) -> set[str]:
        """Columns whose values are names, even where they look like numbers."""
        of_joins = {column for _, by in self.joins for column in by}
        return {*of_joins, *self.path_columns, *(column for column, _ in self.extract.values()), self.majority or ""}

    def __call__(self, rows: Iterable[bytes]) -> Iterator[bytes]:
        """The reshaped rows; what is no JSON object stays as it is, to be listed later.

        Raises:
            UserError: a column that no row has, or a joined table with two rows for one.
        """
        if not (self.majority or self.joins or self.extract or self.path):
            yield from rows
            return
        parsed = (_parsed(raw) for raw in rows)
        if self.majority:
            parsed = iter(_majority(self.name, parsed, self.majority))
        tables = [(by, self._table(path, by)) for path, by in self.joins]
        for row in parsed:
            if isinstance(row, bytes):
                yield row
                continue
            for by, table in tables:
                row = table.get(_values(row, by), {}) | row
            for made, (column, pattern) in self.extract.items():
                found = pattern.search(_text(row.get(column)))
                row[made] = found[found.re.groups and 1] if found else None
            if self.path is not None:
                texts = {column: _text(row.get(column)) for column in self.path_columns}
                row[PATH] = self.path.format(**texts) if all(texts.values()) else None
            yield orjson.dumps(row)

    def _table(self, path: Path, by: tuple[str, ...]) -> dict[tuple[str, ...], Row]:
        table: dict[tuple[str, ...], Row] = {}
        for raw in self.read(path, {*by}):
            row = parse_json(raw)
            if missing := [column for column in by if column not in row]:
                raise UserError(f"source {self.name}: {path} has no column {missing[0]!r}; they are: {', '.join(row)}")
            if table.setdefault(_values(row, by), row) is not row:
                raise UserError(
                    f"source {self.name}: {path} has two rows of the same {' and '.join(by)}: join by columns that "
                    "tell its rows apart"
                )
        return table


def _join(name: str, config: Mapping[str, Any]) -> tuple[Path, tuple[str, ...]]:
    if not isinstance(config, Mapping) or set(config) != {"table", "by"} or not config["by"]:
        raise UserError(f"source {name}: join is {config!r}: write {{table: other.csv, by: [column, …]}}")
    by = (config["by"],) if isinstance(config["by"], str) else tuple(map(str, config["by"]))
    return Path(str(config["table"])).expanduser(), by


def _extract(name: str, config: Mapping[str, Any]) -> dict[str, tuple[str, re.Pattern[str]]]:
    try:
        return {made: (str(how["column"]), re.compile(how["pattern"])) for made, how in config.items()}
    except (AttributeError, KeyError, TypeError, re.error):
        raise UserError(
            f"source {name}: extract is {config!r}: write {{new column: {{column: Path, pattern: 'patient\\d+'}}}}"
        ) from None


def _placeholders(name: str, path: str) -> list[str]:
    try:
        columns = [column for _, column, _, _ in Formatter().parse(str(path)) if column is not None]
        if not columns or any(re.search(r"[.\[\]{}!]", column) or column.strip() != column for column in columns):
            raise ValueError
        path.format(**dict.fromkeys(columns, "x"))
    except (ValueError, KeyError, IndexError, AttributeError):
        raise UserError(
            f"source {name}: image_path is {path!r}: write columns in braces, e.g. p{{subject:.2}}/{{dicom_id}}.jpg"
        ) from None
    return columns


def _parsed(raw: bytes) -> Row | bytes:
    try:
        return parse_json(raw)
    except BadSample:
        return raw


def _majority(name: str, rows: Iterable[Row | bytes], by: str) -> Sequence[Row | bytes]:
    groups: dict[str, list[Row]] = {}
    kept: list[Row | bytes] = []
    for row in rows:
        if isinstance(row, bytes):
            kept.append(row)
        elif by not in row:
            raise UserError(f"source {name}: majority: no column {by!r}; the columns are: {', '.join(row)}")
        else:
            groups.setdefault(_text(row[by]), []).append(row)
    return kept + [{c: _voted([row.get(c) for row in votes]) for c in votes[0]} for votes in groups.values()]


def _voted(values: list[Any]) -> Any:
    if all(isinstance(value, int | float) and value in (0, 1) for value in values):
        return int(2 * sum(values) > len(values))
    return values[0]


def _values(row: Row, columns: Sequence[str]) -> tuple[str, ...]:
    return tuple(_text(row.get(column)) for column in columns)


def _text(value: Any) -> str:
    return "" if value is None else str(value)
