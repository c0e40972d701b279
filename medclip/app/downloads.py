"""A map as a file to take away: as `medclip heatmap` writes it."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from medclip.app.maps import Map
from slides.heat_geojson import tiles, write_features
from slides.heat_image import draw
from slides.heat_table import write_table
from slides.heat_tiff import write_heat_tiff
from slides.overview import overview
from slides.reader import Slide

_LONGEST = 2048  # side of the picture
_CELL = 32  # pixels of a patch in the TIFF at least: it is opened over the slide, at any size


@dataclass(frozen=True)
class Download:
    """One kind of file.

    Args:
        make: its content, of a map and its open slide.
        media: HTTP's name of its type.
    """

    make: Callable[[Map, Slide], bytes]
    media: str


def _png(found: Map, slide: Slide) -> bytes:
    seen = overview(slide, slide.mpp * max(max(slide.size) / _LONGEST, 1.0))
    out = io.BytesIO()
    title = f"{found.wanted.slide}: {found.wanted.title}"
    draw(seen, found.heat, found.scale, title=title, label=found.unit).save(out, "png")
    return out.getvalue()


def _written(name: str, write: Callable[[Path], object]) -> bytes:
    """What a function writes to a file."""
    with tempfile.TemporaryDirectory(prefix="medclip-") as folder:
        path = Path(folder) / name
        write(path)
        return path.read_bytes()


def _geojson(found: Map, slide: Slide) -> bytes:
    patches = tiles(found.values, found.coords, found.side, found.size, found.scale, found.wanted.title)
    return _written("map.geojson", lambda path: write_features(path, patches))


def _tiff(found: Map, slide: Slide) -> bytes:
    down = max(int(found.heat.cell / _CELL), 1)
    return _written(
        "map.tiff",
        lambda path: write_heat_tiff(
            path, found.heat, found.scale, mpp=slide.mpp, downsample=down, compression="deflate"
        ),
    )


def _csv(found: Map, slide: Slide) -> bytes:
    return _written(
        "map.csv",
        lambda path: write_table(
            path, found.wanted.slide, found.values, found.coords, found.side, label=found.unit, scale=found.scale.said
        ),
    )


DOWNLOADS = {
    "png": Download(_png, "image/png"),
    "geojson": Download(_geojson, "application/geo+json"),
    "tiff": Download(_tiff, "image/tiff"),
    "csv": Download(_csv, "text/csv; charset=utf-8"),
}
