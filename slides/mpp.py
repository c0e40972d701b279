"""How large a pixel is, and who says so: a slide whose mpp is unknown is refused, never read as if it were known.

In this order: the user's table; the scanner's own keys; the TIFF resolution; the objective's power (10 / power, which
is a convention and no measurement, so it comes with a warning).
"""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slides.errors import SlideError

_log = logging.getLogger(__name__)
# µm a pixel. Wider than any scanner; 1000, 0, NaN and the 352.8 of "72 dpi" lie outside.
MIN_MPP, MAX_MPP = 0.01, 50.0
_KEYS = (
    ("openslide.mpp-x", "openslide.mpp-y"),
    ("aperio.MPP", "aperio.MPP"),
    ("ome.PhysicalSizeX", "ome.PhysicalSizeY"),
    ("leica.mpp-x", "leica.mpp-y"),
    ("mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_X", "mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_Y"),
)
_POWERS = ("openslide.objective-power", "aperio.AppMag", "ome.NominalMagnification", "hamamatsu.SourceLens")
_UNITS = {"inch": 25_400.0, "centimeter": 10_000.0}


@dataclass(frozen=True)
class Mpp:
    """Micrometres a level-0 pixel, and where that is written."""

    value: float
    source: str


def resolve_mpp(name: str, properties: Mapping[str, str], given: float | None = None) -> Mpp:
    """The mpp of a slide.

    Args:
        name: of the slide, for messages.
        properties: openslide's.
        given: what the user's table says.

    Raises:
        SlideError: nothing plausible is found, or pixels are not square.
    """
    doubts: list[str] = []
    if given is not None:
        if not MIN_MPP <= given <= MAX_MPP:
            raise SlideError(f"{name}: the table says mpp {given:g}, which is no pixel size ({MIN_MPP}-{MAX_MPP} µm)")
        return Mpp(given, "table")
    for keys in _KEYS:
        pair = [_number(properties.get(key)) for key in keys]
        if (found := _plausible(name, " / ".join(dict.fromkeys(keys)), pair, doubts)) is not None:
            return _said(name, Mpp(found, keys[0]), doubts)
    unit = _UNITS.get(properties.get("tiff.ResolutionUnit", "").lower())
    if unit is not None:
        dots = [_number(properties.get(f"tiff.{axis}Resolution")) for axis in "XY"]
        pair = [unit / dot if dot else None for dot in dots]
        if (found := _plausible(name, "tiff.XResolution", pair, doubts)) is not None:
            return _said(name, Mpp(found, "tiff.XResolution"), doubts)
    for key in _POWERS:
        power = _number(properties.get(key))
        if power and 1 <= power <= 200:
            _log.warning("%s: mpp taken from the objective's power, %g x: 10 / %g = %g", name, power, power, 10 / power)
            return _said(name, Mpp(10 / power, key), doubts)
    raise SlideError(
        f"{name}: its mpp is not known ({'; '.join(doubts) or 'the file does not say'}): give it in a table "
        "(columns slide, mpp), as mpp of all slides (slide_mpp=0.5), or leave the slide out"
    )


def _said(name: str, mpp: Mpp, doubts: list[str]) -> Mpp:
    if doubts:
        _log.warning("%s: %s; mpp %g is from %s", name, "; ".join(doubts), mpp.value, mpp.source)
    return mpp


def _number(text: str | None) -> float | None:
    try:
        return float(str(text).replace(",", ".")) if text else None
    except ValueError:
        return math.nan


def _plausible(name: str, key: str, pair: list[float | None], doubts: list[str]) -> float | None:
    if None in pair or not pair:
        return None
    x, y = (float(value) for value in pair if value is not None)
    if not (MIN_MPP <= x <= MAX_MPP and MIN_MPP <= y <= MAX_MPP):  # false for NaN too
        doubts.append(f"{key} is {x:g}")
        return None
    if abs(x / y - 1) > 0.05:
        raise SlideError(f"{name}: pixels are not square ({x:g} x {y:g} µm by {key}): give one mpp in a table")
    return math.sqrt(x * y)


def read_mpp_table(path: Path) -> dict[str, float]:
    """`{slide: mpp}` of a CSV with the columns `slide` (or TRIDENT's `wsi`) and `mpp`.

    Raises:
        SlideError: it cannot be read, lacks a column, or a row holds no number.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SlideError(f"{path}: cannot be read as CSV ({error})") from None
    table: dict[str, float] = {}
    for number, row in enumerate(rows, 2):
        slide = row.get("slide") or row.get("wsi")
        mpp = _number(row.get("mpp"))
        if not slide or mpp is None or not MIN_MPP <= mpp <= MAX_MPP:
            raise SlideError(f"{path}: line {number} needs columns slide and mpp (a number of µm), it has {dict(row)}")
        table[slide] = mpp
    return table
