"""What is known of slides beside their features: class, patient, texts, and where a region lies on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from medclip.data.bad import BadSample
from medclip.data.bag_table import USUAL
from medclip.data.filters import Filter
from medclip.data.pick import Pick
from medclip.data.tables import table_rows
from medclip.types import UserError
from slides.errors import SlideError
from slides.mask import coverage
from slides.plan import own_mask


class SlideLabels:
    """A table of slides (CSV, TSV, JSON lines, Excel, parquet), a row a slide.

    Args:
        path: of the table.
        slide: column of the slides' names; None for `slide` or a usual name of it (`bag_table.USUAL`).
        label: column of the class, or how it is found (see `pick`); None for slides without.
        group: what the bootstrap draws, likewise; None takes the column `patient` (or a usual name of it) where there
            is one, else each slide.
        captions: columns with texts about the slide.
        header: names of the columns of a CSV that has none.
        filter: expression on the columns (see `filters`); rows that it does not hold of are no slides of ours.

    Raises:
        UserError: it cannot be read, names a slide twice, has no such column, or none of its rows passes the filter.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        slide: str | None = None,
        label: str | Mapping[str, Any] | None = "label",
        group: str | Mapping[str, Any] | None = None,
        captions: str | Sequence[str] | None = None,
        header: Sequence[str] | None = None,
        filter: str | None = None,
    ) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise UserError(f"table of slides {self.path} is not there: name a CSV with columns slide, patient, label")
        texts = {name for usual in USUAL.values() for name in usual} | ({slide} if slide else set())
        rows = [orjson.loads(row) for row in table_rows(self.path, header, texts)]
        columns = dict.fromkeys(column for row in rows for column in row)
        own = next((name for name in ((slide,) if slide else USUAL["slide"]) if name in columns), None)
        if own is None:
            raise UserError(
                f"{self.path}: no column {slide or ', '.join(USUAL['slide'])}; there are {', '.join(columns)}: name it "
                "by slide, or a CSV's columns by header"
            )
        if group is None:
            group = next((name for name in USUAL["patient"] if name in columns), None)
        self.label, self.group = Pick.parse("label", label), Pick.parse("group", group)
        self.captions = [captions] if isinstance(captions, str) else list(captions or [])
        wanted = [field for pick in (self.label, self.group) if pick for field in pick.fields] + self.captions
        if lacking := [name for name in wanted if name not in columns]:
            raise UserError(f"{self.path}: no column {lacking[0]!r}; there are {', '.join(columns)}")
        if filter is not None:
            keep = Filter(filter)
            rows = [row for row in rows if keep(row)]
            if not rows:
                raise UserError(f"{self.path}: filter {filter!r} leaves no slide: mend it, or leave it out")
        self.rows: dict[str, dict[str, Any]] = {}
        for row in rows:
            if (name := str(row[own])) in self.rows:
                raise UserError(f"{self.path}: slide {name} is there twice: leave one row of it")
            self.rows[name] = row

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def texts(self, name: str) -> list[str]:
        """What its columns of captions say."""
        found = [str(self.rows[name].get(column) or "").strip() for column in self.captions]
        return [text for text in found if text]

    def about(self, name: str) -> dict[str, Any]:
        """`label` (str or None), `group`, `captions`, and the row as `raw`.

        Raises:
            BadSample: the row has no label or group.
        """
        row = self.rows[name]
        return {
            "label": self.label(row) if self.label is not None else None,
            "group": self.group(row) if self.group is not None else name,
            "captions": self.texts(name),
            "raw": row,
        }


@dataclass(frozen=True)
class Truth:
    """Masks of a region of slides, such as tumour.

    Args:
        masks: folder of ID.geojson (QuPath's, or of `scripts/make_slides.py`), ID.png or ID.tif.
        classes: of the GeoJSON's annotations, those that count; empty: all.
        exclude: of the GeoJSON's annotations, those that are cut out.
        downsample: level-0 pixels a pixel that outlines are drawn at.
    """

    masks: str
    classes: Sequence[str] = ()
    exclude: Sequence[str] = ()
    downsample: float = 8.0

    def __call__(self, name: str, coords: np.ndarray, side: float, size: tuple[int, int]) -> dict[str, Any]:
        """`share` float32 (n,) of each patch inside the region, and the region's `area` in patches.

        Args:
            name: of the slide.
            coords: int (n, 2) level-0 corners.
            side: of a patch, in level-0 pixels.
            size: (width, height) of level 0.

        Raises:
            BadSample: there is no mask, or a broken one.
        """
        try:
            mask = own_mask(Path(self.masks), name, size, 2 * self.downsample, self.classes, self.exclude)
        except SlideError as error:
            raise BadSample("no mask", str(error)) from None
        return {"share": coverage(mask, coords, side), "area": mask.area / side**2}
