"""Shards as a source: webdataset tars as BIOMEDICA, open_clip and CLIP_benchmark write them, read at random.

Members of a sample: one image (`jpg`, `png`, `webp`, …), the caption (`txt` or `caption`), metadata (`json`), a class
number (`cls`, CLIP_benchmark). The metadata is read and parsed only on demand: BIOMEDICA's holds whole articles.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import orjson

from medclip.data.bad import BadSample
from medclip.data.captions import CaptionRule
from medclip.data.http import public
from medclip.data.index import digest, fingerprint
from medclip.data.raw import RawSample
from medclip.data.storage import Storage, is_local
from medclip.data.tar import IMAGES, TarIndex
from medclip.types import UserError

_TEXTS = ("txt", "caption")
_CHUNK = 256  # samples that are read together: some tens of MB, so a permutation of chunks keeps reads near each other


@dataclass(frozen=True)
class ShardSource:
    """Samples of a list of shards, in the order of the shards.

    Args:
        name: in messages and reports.
        storage: reads the bytes.
        indexes: one per shard.
        rows: numbers of the samples that are in, counted over all shards.
        caption: how captions are made.
        weight: passes per epoch.
        problems: (key, reason, detail) of samples that are left out.
        classes: class names by number, for sets with `cls` members.
    """

    name: str
    storage: Storage
    indexes: Sequence[TarIndex]
    rows: np.ndarray
    caption: CaptionRule = field(default_factory=CaptionRule)
    weight: float = 1.0
    problems: list[tuple[str, str, str]] = field(default_factory=list)
    classes: tuple[str, ...] = ()
    starts: np.ndarray = field(init=False)
    chunks: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        lengths = [len(index) for index in self.indexes]
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        # Chunks of nearly equal size within each shard, numbered over all shards.
        first, chunk = 0, np.empty(starts[-1], dtype=np.int64)
        for start, length in zip(starts[:-1], lengths, strict=True):
            count = -(-length // _CHUNK)
            chunk[start : start + length] = first + np.arange(length) * count // max(length, 1)
            first += count
        changes = np.flatnonzero(np.diff(chunk[self.rows])) + 1
        object.__setattr__(self, "starts", starts)
        object.__setattr__(self, "chunks", np.concatenate([[0], changes]).astype(np.int64))

    @classmethod
    def open(
        cls, name: str, storage: Storage, indexes: Sequence[TarIndex], caption: CaptionRule, weight: float = 1.0
    ) -> ShardSource:
        """Sort out what is no pair.

        Raises:
            UserError: nothing is left.
        """
        problems: list[tuple[str, str, str]] = []
        kept: list[np.ndarray] = []
        start = 0
        wanted = [("missing image", IMAGES)] + [("missing caption", _TEXTS)] * caption.needs_text
        # A class number alone is metadata too: the caption may be made of the class's name.
        wanted += [("missing metadata", ("json", "cls"))] * (caption.needs_meta and not caption.takes_text)
        for index in indexes:
            where = public(index.url)
            if index.truncated:
                lost = index.lost or (where,)
                problems += [(key, "truncated tar", f"{where} ends early") for key in lost]
            good = np.ones(len(index), dtype=bool)
            for reason, extensions in wanted:
                there = np.zeros(len(index), dtype=bool)
                for extension in extensions:
                    if extension in index.offsets:
                        there |= index.offsets[extension] >= 0
                problems += [(index.keys[int(row)], reason, where) for row in np.flatnonzero(good & ~there)]
                good &= there
            kept.append(start + np.flatnonzero(good))
            start += len(index)
        rows = np.concatenate(kept).astype(np.int64)
        if not len(rows):
            shown = ", ".join(sorted({extension for index in indexes for extension in index.offsets})) or "nothing"
            said = problems[0][1] if problems else "no sample"
            raise UserError(
                f"source {name}: no usable sample in {len(indexes)} shards ({said}; members there are: {shown}): "
                "check the shards, or set `caption` (a metadata field, or false where none is needed)"
            )
        labelled = next((index.url for index in indexes if "cls" in index.offsets), None)
        classes = _class_names(storage, labelled) if labelled is not None else ()
        return cls(name, storage, indexes, rows, caption, weight, problems, classes)

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, i: int) -> str:
        index, row = self._locate(i)
        return index.keys[row]

    def read(self, i: int, *, want_meta: bool = False) -> RawSample:
        index, row = self._locate(i)
        image = self._member(index, row, IMAGES)
        if image is None:
            raise BadSample("missing image", public(index.url))
        meta = self._meta(index, row) if want_meta or self.caption.needs_meta else None
        return RawSample(index.keys[row], image, self._text(index, row), meta)

    def fields(self, i: int) -> dict[str, Any]:
        index, row = self._locate(i)
        return {"key": index.keys[row], "caption": self._text(index, row)} | self._meta(index, row)

    def extents(self, i: int) -> tuple[str, int, int] | None:
        index, row = self._locate(i)
        if is_local(index.url):
            return None
        wanted = (*IMAGES, *_TEXTS, *(("json", "cls") if self.caption.needs_meta else ()))
        places = [
            (int(index.offsets[extension][row]), int(index.sizes[extension][row]))
            for extension in wanted
            if extension in index.offsets and index.offsets[extension][row] >= 0
        ]
        first = min(offset for offset, _ in places)
        return index.url, first, max(offset + size for offset, size in places) - first

    def select(self, rows: np.ndarray) -> ShardSource:
        return replace(self, rows=self.rows[rows])

    def fingerprint(self) -> str:
        shards = [(index.url, index.size, index.tag) for index in self.indexes]
        return fingerprint([*shards, digest(self.rows), self.classes])

    def _locate(self, i: int) -> tuple[TarIndex, int]:
        row = self.rows[i]
        shard = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.indexes[shard], int(row - self.starts[shard])

    def _member(self, index: TarIndex, row: int, extensions: Sequence[str]) -> bytes | None:
        """The first of `extensions` that the sample has."""
        for extension in extensions:
            column = index.offsets.get(extension)
            if column is not None and (offset := int(column[row])) >= 0:
                return self.storage.read(index.url, offset, int(index.sizes[extension][row]))
        return None

    def _text(self, index: TarIndex, row: int) -> str | None:
        text = self._member(index, row, _TEXTS)
        return None if text is None else text.decode("utf-8-sig", "replace")

    def _meta(self, index: TarIndex, row: int) -> dict[str, Any]:
        raw = self._member(index, row, ("json",))
        meta = {} if raw is None else parse_json(raw)
        number = self._member(index, row, ("cls",))
        if number is not None:
            try:
                meta["cls"] = int(number)
            except ValueError:
                raise BadSample("broken metadata", f"cls is {number[:20]!r}, not a class number") from None
            if self.classes and "label" not in meta:
                if not 0 <= meta["cls"] < len(self.classes):
                    raise BadSample("broken metadata", f"cls {meta['cls']} of {len(self.classes)} classes")
                meta["label"] = self.classes[meta["cls"]]
        return meta


def parse_json(raw: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        BadSample: it is none.
    """
    try:
        meta = orjson.loads(raw)
    except orjson.JSONDecodeError:
        try:
            # Takes NaN, which Python and pandas write and JSON forbids, and half surrogates, which no text may hold.
            meta = json.loads(raw)
            meta = json.loads(json.dumps(meta, ensure_ascii=False).encode("utf-8", "replace"))
        except (ValueError, RecursionError) as error:
            raise BadSample("broken metadata", str(error)[:120]) from None
    if not isinstance(meta, dict):
        raise BadSample("broken metadata", f"a JSON {type(meta).__name__}, not an object")
    return meta


def _class_names(storage: Storage, shard: str) -> tuple[str, ...]:
    """CLIP_benchmark's `classnames.txt`, beside the shards or one folder up; empty if there is none."""
    folder = shard.rpartition("/")[0]
    for place in (folder, folder.rpartition("/")[0]) if folder else (".", ".."):
        try:
            lines = storage.read_all(f"{place}/classnames.txt").decode("utf-8-sig").strip().split("\n")
            return tuple(line.strip() for line in lines)
        except UserError:
            continue
    return ()
