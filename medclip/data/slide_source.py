"""Patches of slides as a source: read from the slide, by the process that asks, when they are asked for.

A patch that is a stored JPEG tile is handed out as stored; others are JPEG of quality 95, or PNG where exact pixels are
asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from medclip.data.bad import BadSample
from medclip.data.captions import CaptionRule
from medclip.data.index import digest, fingerprint
from medclip.data.packed import Packed
from medclip.data.raw import RawSample
from medclip.data.shards import parse_json
from medclip.data.tables import Problems
from slides.dataset import Handles
from slides.entry import member_name
from slides.errors import SlideError, TileError
from slides.patches import CORRUPT
from slides.stream import Encoding, stored_tiles, stream

_RUN = 256  # patches of a slide that stay together: few enough that a batch mixes slides
_LOSSY, _EXACT = Encoding(quality=95, subsampling="444"), Encoding("png")


@dataclass(frozen=True)
class SlideSource:
    """Patches of slides.

    Args:
        name: in messages and reports.
        handles: the slides and their plans; opens them in the process that reads.
        files: a digest of the slides' paths, sizes and times.
        rows: int64, numbers of the patches that are in, over all slides one after another.
        table: one JSON object a patch, where patches are a table's.
        again: int32, for each patch how many before it have its place; None where places differ.
        text: the caption's column in the table, or in the cohort's CSV.
        caption: how captions are made.
        weight: passes per epoch.
        problems: (key, reason, detail) of slides and rows left out.
    """

    name: str
    handles: Handles
    files: str
    rows: np.ndarray
    table: Packed | None = None
    again: np.ndarray | None = None
    text: str | None = None
    caption: CaptionRule = field(default_factory=CaptionRule)
    weight: float = 1.0
    problems: Problems = field(default_factory=list)
    _starts: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_starts", np.cumsum([0, *(len(plan) for _, plan in self.handles.slides)]))

    @property
    def chunks(self) -> np.ndarray:
        slides = np.searchsorted(self._starts, self.rows, side="right") - 1
        run = (self.rows - self._starts[slides]) // _RUN
        return np.flatnonzero(np.diff(slides, prepend=-1) | np.diff(run, prepend=-1))

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, i: int) -> str:
        slide, row = self._locate(i)
        entry, plan = self.handles.slides[slide]
        key = member_name(entry.slide, *plan.coords[row].tolist())
        again = 0 if self.again is None else int(self.again[self.rows[i]])
        return f"{key}_{again}" if again else key

    def read(self, i: int, *, want_meta: bool = False) -> RawSample:
        meta = self._meta(i)
        slide, row = self._locate(i)
        try:
            image = self._image(slide, row)
        except TileError as error:
            raise BadSample("broken image", str(error)) from None
        except SlideError as error:
            raise BadSample("read error", str(error)) from None
        return RawSample(self.key(i), image, self._text(meta), meta if want_meta else None)

    def fields(self, i: int) -> dict[str, Any]:
        meta = self._meta(i)
        return {"key": self.key(i), "caption": self._text(meta)} | meta

    def extents(self, i: int) -> tuple[str, int, int] | None:
        return None

    def select(self, rows: np.ndarray) -> SlideSource:
        return replace(self, rows=self.rows[rows])

    def fingerprint(self) -> str:
        patches = [digest(plan.coords) + plan.settings for _, plan in self.handles.slides]
        extras = [sorted(entry.extra.items()) for entry, _ in self.handles.slides]
        table = digest(self.table.blob) if self.table is not None else ""
        request = self.handles.request.fingerprint()
        return fingerprint([self.files, request, table, digest(self.rows), *patches, *extras])

    def _locate(self, i: int) -> tuple[int, int]:
        """The slide's number and the patch's in its plan."""
        number = int(self.rows[i])
        slide = int(np.searchsorted(self._starts, number, side="right")) - 1
        return slide, number - int(self._starts[slide])

    def _image(self, number: int, row: int) -> bytes:
        """The patch as an image file.

        Raises:
            TileError: it cannot be decoded.
            SlideError: the slide cannot be opened any more.
        """
        plan, exact = self.handles.slides[number][1], self.handles.request.exact
        with self.handles.lent(number) as (slide, change):
            tiles = stored_tiles(slide, plan, plan.coords[row : row + 1]) if change is None else None
            if tiles is not None and tiles[0, 0] >= 0:
                stored = slide.tile_jpeg(plan.geometry.level, *tiles[0].tolist())
                if stored is not None:
                    return stored
            encoding = _EXACT if exact else _LOSSY
            (chunk,) = stream(slide, plan, slice(row, row + 1), exact=exact, change=change, encoding=encoding)
        if chunk.status[0] == CORRUPT or chunk.value.files is None:
            raise TileError("; ".join(chunk.broken))
        return chunk.value.files[0]

    def _meta(self, i: int) -> dict[str, Any]:
        slide, row = self._locate(i)
        entry, plan = self.handles.slides[slide]
        x, y = plan.coords[row].tolist()
        own = parse_json(self.table.bytes(int(self.rows[i]))) if self.table is not None else {}
        one = plan.geometry
        known = {"slide": entry.slide, "x": x, "y": y, "mpp": one.mpp, "level": one.level, "read_size": one.read}
        known["size"] = one.size
        if self.table is None:
            known["coverage"] = round(float(plan.coverage[row]), 4)
        return {**entry.extra, **own, **known}

    def _text(self, meta: Mapping[str, Any]) -> str | list[str] | None:
        value = meta.get(self.text) if self.text is not None else None
        if isinstance(value, list):
            return [str(text) for text in value if text is not None]
        return None if value is None else str(value)
