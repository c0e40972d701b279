"""One slide of a cohort on its way to a heat map: features read and checked, values made, every file written.

    OUT/png/ID.png  OUT/geojson/ID.geojson  OUT/tiff/ID.tiff  OUT/values/ID.parquet (or .csv)  OUT/manifest.csv

A slide is finished when its row is in OUT/state; the same command again passes over it as long as its features and the
settings are what they were. A slide that failed is tried again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import cv2
import numpy as np
import orjson

from slides.belongs import features_of, read_belonging
from slides.entry import Entry
from slides.errors import SlideError, said
from slides.files import Busy, OutputError, alone, sweep, write_whole
from slides.heat_colours import DIVERGING, SEQUENTIAL, Scale, make_scale, table
from slides.heat_geojson import regions, threshold_of, tiles, write_features
from slides.heat_image import draw, save_png
from slides.heat_table import write_table
from slides.heat_tiff import write_heat_tiff
from slides.heatmap import HeatMap, heat_map
from slides.identity import identity
from slides.open import open_slide
from slides.overview import Overview, overview
from slides.reader import Slide
from slides.request import digest

Kind = Literal["png", "geojson", "tiff", "parquet", "csv"]


class Source(Protocol):
    """What gives patches their values."""

    @property
    def name(self) -> str: ...  # of the values, short: a measurement in QuPath

    @property
    def label(self) -> str: ...  # what they are, for a legend

    @property
    def signed(self) -> bool: ...  # whether 0 is their middle

    def __call__(self, features: np.ndarray, about: Mapping[str, Any], where: str) -> np.ndarray:
        """(n,) values of float32 features (n, d); `about` are the file's attributes, `where` its name for errors.

        Raises:
            SlideError: they are another model's.
        """
        ...


@dataclass(frozen=True)
class Look:
    """How a map looks, and which files are made of it.

    Args:
        save: of png, geojson, tiff, parquet, csv.
        palette: see `heat_colours`; None: viridis, or RdBu_r for values around 0.
        percentiles: of a slide's values that become the ends of its scale.
        limits: the ends, for all slides.
        smooth: see `heatmap.heat_map`; the table and the tiles of the GeoJSON keep the values as they are.
        alpha: how much of the map is seen over the slide.
        longest: side of the PNG's overview in pixels.
        grey: the overview without its colours, which else mix with the map's.
        downsample: of the TIFF, see `heat_tiff`.
        compression: of the TIFF.
        over: the TIFF shows the slide below the map.
        patches: the GeoJSON has a tile a patch.
        threshold: regions at or above this value go into the GeoJSON.
        threshold_percentile: the same, a percentile of the slide's values.
        min_area: mm², smaller regions are left out.

    Raises:
        SlideError: an option that makes no sense.
    """

    save: tuple[str, ...] = ("png", "geojson", "parquet")
    palette: str | None = None
    percentiles: tuple[float, ...] = (1, 99)
    limits: tuple[float, ...] | None = None
    smooth: float = 0.0
    alpha: float = 0.6
    longest: int = 2000
    grey: bool = True
    downsample: int = 1
    compression: Literal["jpeg", "deflate"] = "jpeg"
    over: bool = False
    patches: bool = True
    threshold: float | None = None
    threshold_percentile: float | None = None
    min_area: float = 0.0

    def __post_init__(self) -> None:
        if not self.save or set(self.save) - set(get_args(Kind)):
            raise SlideError(f"save is {list(self.save)}: choose of {', '.join(get_args(Kind))}")
        if not 0 < self.alpha <= 1:
            raise SlideError(f"alpha is {self.alpha}: choose above 0 (nothing) to 1 (the map alone)")
        if not 100 <= self.longest <= 10_000:
            raise SlideError(f"a picture of {self.longest} pixels: choose 100 to 10000")
        if self.compression not in ("jpeg", "deflate") or self.downsample < 1:
            raise SlideError(
                f"a TIFF of {self.compression} at downsample {self.downsample}: jpeg or deflate, 1 or more"
            )
        if "geojson" in self.save and not (self.patches or self._has_regions):
            raise SlideError("the GeoJSON would be empty: let it have patches, or regions above a value or percentile")
        for palette in (SEQUENTIAL[0] if self.palette is None else self.palette, DIVERGING[0]):
            table(palette)
        make_scale(np.array([0.0, 1.0]), self.palette or self._plain, percentiles=self.percentiles, limits=self.limits)
        threshold_of(np.array([0.0]), value=self.threshold, percentile=self.threshold_percentile)

    @property
    def _has_regions(self) -> bool:
        return self.threshold is not None or self.threshold_percentile is not None

    @property
    def _plain(self) -> str:
        return SEQUENTIAL[0]

    def scale(self, values: np.ndarray, signed: bool) -> Scale:
        """Of a slide's map."""
        centred = signed and (self.limits is None or self.limits[0] == -self.limits[1])
        palette = self.palette or (DIVERGING[0] if centred else self._plain)
        return make_scale(values, palette, percentiles=self.percentiles, limits=self.limits)


def paths_of(folder: Path, slide: str, save: tuple[str, ...]) -> dict[str, Path]:
    """Where a slide's files go, by kind."""
    below = {"parquet": "values", "csv": "values"}
    return {kind: folder / below.get(kind, kind) / f"{slide}.{kind}" for kind in save}


def heat_slide(
    entry: Entry,
    progress: Callable[[int, int], None],
    *,
    features: Path,
    folder: Path,
    look: Look,
    source: Source,
    settings: str,
) -> dict[str, Any]:
    """Make a slide's files; its row for the manifest, which says why where it failed.

    Args:
        entry: the slide.
        progress: told of patches planned and done.
        features: folder of the features, see `belongs.features_of`.
        folder: OUT.
        look: of the map.
        source: of the values.
        settings: fingerprint of source and look, see `fingerprint`.

    Raises:
        OutputError: nothing can be written.
    """
    started = time.perf_counter()
    row: dict[str, Any] = {"slide": entry.slide, "path": entry.path, "settings": settings, "patches": 0}
    state = folder / "state" / f"{entry.slide}.json"
    targets = paths_of(folder, entry.slide, look.save)
    try:
        with alone(folder / "state" / f"{entry.slide}.lock"):
            sweep([state.parent, *(path.parent for path in targets.values())], entry.slide)
            try:
                found = features_of(features, entry.slide)
                row["features"] = identity(found)
                if (done := _finished(state, row, targets)) is not None:
                    progress(done["patches"], done["patches"])
                    return done
                row |= _draw(entry, found, targets, look, source, progress)
                row |= {"status": "ok", "seconds": round(time.perf_counter() - started, 2)}
            except OutputError:
                raise
            except Exception as error:  # one bad slide is never the end of the run
                row |= {"status": "failed", "reason": said(error)}
            write_whole(state, orjson.dumps(row))  # last: a kill before it has the slide drawn again
    except Busy as error:
        row |= {"status": "busy", "reason": str(error)}
    return row


def _finished(state: Path, row: Mapping[str, Any], targets: Mapping[str, Path]) -> dict[str, Any] | None:
    try:
        done = orjson.loads(state.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return None
    same = done.get("status") == "ok" and all(done.get(key) == row[key] for key in ("path", "settings", "features"))
    return done if same and all(path.is_file() for path in targets.values()) else None


def _draw(
    entry: Entry,
    path: Path,
    targets: Mapping[str, Path],
    look: Look,
    source: Source,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Write the files of a slide; what its row says of them."""
    with open_slide(entry.path, mpp=entry.mpp) as slide:
        features, coords, side, about = read_belonging(path, slide, entry.slide)
        progress(len(coords), 0)
        values = np.asarray(source(features, about, str(path)), np.float64)
        if values.shape != (len(coords),):
            raise SlideError(f"{path}: {values.shape} values for {len(coords)} patches")
        heat = heat_map(values, coords, side, slide.size, smooth=look.smooth)
        shown = heat.grid if look.smooth else values
        scale = look.scale(shown, source.signed)
        threshold = threshold_of(shown, value=look.threshold, percentile=look.threshold_percentile)
        row = {"patches": len(coords), "low": scale.low, "high": scale.high, "palette": scale.palette}
        found = [] if threshold is None else regions(
            heat, threshold, scale, source.name, mpp=slide.mpp, min_area=look.min_area
        )  # fmt: skip
        if threshold is not None:
            area = sum(one["properties"]["measurements"]["area mm^2"] for one in found)
            row |= {"threshold": threshold, "regions": len(found), "regions_mm2": round(area, 6)}
        for kind, target in targets.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            if kind == "png":
                _picture(target, slide, entry.slide, heat, scale, look, source.label)
            elif kind == "tiff":
                write_heat_tiff(
                    target, heat, scale, mpp=slide.mpp, downsample=look.downsample, compression=look.compression,
                    over=slide if look.over else None, alpha=look.alpha,
                )  # fmt: skip
            elif kind == "geojson":
                own = tiles(values, coords, side, slide.size, scale, source.name) if look.patches else ()
                write_features(target, (one for part in (found, own) for one in part))
            else:
                said_of = f"{scale.low:g} to {scale.high:g}, {scale.palette}, {scale.said}"
                write_table(target, entry.slide, values, coords, side, label=source.label, scale=said_of)
    progress(0, len(coords))
    return row


def _picture(path: Path, slide: Slide, name: str, heat: HeatMap, scale: Scale, look: Look, label: str) -> None:
    seen = overview(slide, slide.mpp * max(max(slide.size) / look.longest, 1))
    if look.grey:
        grey = cv2.cvtColor(cv2.cvtColor(seen.image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        seen = Overview(grey, seen.downsample, seen.mpp)
    note = f"smoothed, σ {look.smooth:g} patches" if look.smooth else ""
    save_png(path, draw(seen, heat, scale, title=name, label=label, alpha=look.alpha, note=note))


def fingerprint(look: Look, source: Any) -> str:
    """Of what a run draws, plain values: a folder of another is refused."""
    return digest([asdict(look), source])
