"""Arrow files as a source: tables with the images in them, as Hugging Face `datasets` keeps them on disk.

    {arrow: "ubench/perception/0.1.0/*.arrow"}

A file is an Arrow stream of record batches; its column `image` is a struct {bytes, path}, or bytes. It is mapped, not
read: an image costs its own bytes, and the workers share them. All other columns are the metadata, nested as they are.
A file is not trusted: Arrow checks every offset when it is opened, and `path` is never followed.
"""

from __future__ import annotations

import glob
from bisect import bisect_right
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from medclip.data.bad import BadSample
from medclip.data.captions import CaptionRule
from medclip.data.index import digest, fingerprint
from medclip.data.raw import RawSample
from medclip.types import UserError


@dataclass(frozen=True)
class ArrowSource:
    """Rows of Arrow files, in the order of their names.

    Args:
        name: in messages and reports.
        paths: of the files.
        image: the column with the images.
        rows: int64, numbers of the rows that are in.
        caption: how captions are made; of metadata fields.
        weight: passes per epoch.
        problems: none.
    """

    name: str
    paths: tuple[str, ...]
    image: str
    rows: np.ndarray
    caption: CaptionRule = field(default_factory=CaptionRule)
    weight: float = 1.0
    problems: list[tuple[str, str, str]] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_batches"}

    @cached_property
    def _batches(self) -> tuple[list[pa.RecordBatch], list[int]]:
        """All record batches, and the number of the first row of each."""
        batches = [batch for path in self.paths for batch in _read(path)]
        return batches, np.cumsum([0, *(len(batch) for batch in batches)]).tolist()

    @property
    def chunks(self) -> np.ndarray:
        return np.arange(len(self.rows), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, i: int) -> str:
        return f"{int(self.rows[i]):07d}"

    def read(self, i: int, *, want_meta: bool = False) -> RawSample:
        batch, row = self._place(i)
        image = batch.column(self.image)[row].as_py()
        data = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(data, bytes):
            raise BadSample("missing image", f"row {self.rows[i]} has no bytes in {self.image}")
        return RawSample(self.key(i), data, None, self._meta(batch, row))

    def fields(self, i: int) -> dict[str, Any]:
        return {"key": self.key(i), "caption": None} | self._meta(*self._place(i))

    def extents(self, i: int) -> tuple[str, int, int] | None:
        return None

    def select(self, rows: np.ndarray) -> ArrowSource:
        return replace(self, rows=self.rows[rows])

    def fingerprint(self) -> str:
        files = [(path, Path(path).stat().st_size, Path(path).stat().st_mtime_ns) for path in self.paths]
        return fingerprint([files, digest(self.rows)])

    def _place(self, i: int) -> tuple[pa.RecordBatch, int]:
        batches, starts = self._batches
        number = bisect_right(starts, int(self.rows[i])) - 1
        return batches[number], int(self.rows[i]) - starts[number]

    def _meta(self, batch: pa.RecordBatch, row: int) -> dict[str, Any]:
        return {name: batch.column(name)[row].as_py() for name in batch.schema.names if name != self.image}


def open_arrow(name: str, pattern: Any, caption: CaptionRule, weight: float = 1.0) -> ArrowSource:
    """Arrow files as a source.

    Args:
        name: of the source.
        pattern: path, or pattern of paths, of the files.
        caption: how captions are made; of metadata fields.
        weight: passes per epoch.

    Raises:
        UserError: no such file, a broken one, or one without the column `image`.
    """
    if caption.wanted and caption.takes_text:
        raise UserError(f"source {name}: Arrow files have no text member: say which column has the captions")
    paths = tuple(sorted(glob.glob(str(Path(str(pattern)).expanduser()))))  # noqa: PTH207  # an absolute pattern
    if not paths:
        raise UserError(f"source {name}: no file matches {pattern}: check the path (relative to {Path.cwd()})")
    rows = 0
    for path in paths:
        for batch in _read(path):
            if "image" not in batch.schema.names:
                raise UserError(f"source {name}: {path} has no column 'image' (it has {', '.join(batch.schema.names)})")
            rows += len(batch)
    if not rows:
        raise UserError(f"source {name}: {pattern} has no rows: check that the download is whole")
    return ArrowSource(name, paths, "image", np.arange(rows), caption, weight)


def _read(path: str) -> list[pa.RecordBatch]:
    try:
        with pa.ipc.open_stream(pa.memory_map(path)) as stream:
            batches = list(stream)
        for batch in batches:
            batch.validate(full=True)
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"cannot read {path} as an Arrow stream: {str(error)[:160]}: download it again") from error
    return batches
