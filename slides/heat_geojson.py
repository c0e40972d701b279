"""A heat map for QuPath (0.4 and later): each patch as a tile with its value and colour, and regions above a threshold.

Objects as QuPath's own export writes them: `objectType`, `color`, `measurements` as an object of numbers. Tiles of one
measurement are what its measurement maps draw; regions are annotations, whose area and mean are measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import shapely
import shapely.affinity
from shapely.geometry import mapping

from slides.errors import SlideError
from slides.files import write_whole
from slides.geojson import polygons
from slides.heat_colours import Scale
from slides.heatmap import HeatMap
from slides.mask import Mask, areas


def tiles(
    values: np.ndarray, coords: np.ndarray, side: float, size: tuple[int, int], scale: Scale, name: str
) -> Iterator[dict[str, Any]]:
    """Patches as features of a FeatureCollection, cut at the slide's border; those without a finite value are left out.

    Args:
        values: (n,).
        coords: (n, 2) level-0 x and y.
        side: in level-0 pixels.
        size: (width, height) of level 0.
        scale: of the colours.
        name: of the measurement.
    """
    good = np.isfinite(values)
    low = np.maximum(np.asarray(coords, np.float64)[good], 0)
    high = np.minimum(np.asarray(coords, np.float64)[good] + side, size)
    values = np.asarray(values, np.float64)[good]
    for (x0, y0), (x1, y1), value, colour in zip(
        low.tolist(), high.tolist(), values.tolist(), scale.colour(values).tolist(), strict=True
    ):
        ring = [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]
        yield {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": {"objectType": "tile", "color": colour, "measurements": {name: value}},
        }


def regions(
    heat: HeatMap, threshold: float, scale: Scale, name: str, *, mpp: float, min_area: float = 0.0
) -> list[dict[str, Any]]:
    """The connected parts of the map at or above a threshold, as annotations, the largest first.

    Args:
        heat: the map.
        threshold: a value.
        scale: of the colours; a region has that of its mean.
        name: of the measurement.
        mpp: of level 0.
        min_area: mm²; smaller parts are left out.
    """
    array = np.nan_to_num(heat.grid, nan=-np.inf) >= threshold
    whole = polygons(Mask(array, heat.cell, name)) if array.any() else []
    whole = [shapely.affinity.translate(part, *heat.origin) for part in whole]
    slide = shapely.box(0, 0, *heat.size)
    # Values are counted before the border cuts the centre of a cell off.
    parts = [(part, _values_in(heat, one)) for one in whole for part in areas([one.intersection(slide)])]
    found = []
    for part, inside in sorted(parts, key=lambda one: -one[0].area):
        area = part.area * mpp**2 / 1e6
        if area < min_area:
            continue
        found.append(
            {
                "type": "Feature",
                "geometry": mapping(shapely.geometry.polygon.orient(part)),
                "properties": {
                    "objectType": "annotation",
                    "name": f"{name} ≥ {threshold:.4g}",
                    "classification": {"name": f"{name} region", "color": scale.colour(np.array(scale.high)).tolist()},
                    "isLocked": False,
                    "measurements": {
                        f"{name}: mean": float(inside.mean(dtype=np.float64)),
                        f"{name}: max": float(inside.max()),
                        "area mm^2": area,
                    },
                },
            }
        )
    return found


def _values_in(heat: HeatMap, part: shapely.Polygon) -> np.ndarray:
    """Values of the cells whose centre lies in a region."""
    (x0, y0, x1, y1), (ox, oy) = part.bounds, heat.origin
    first = max(int((y0 - oy) / heat.cell), 0), max(int((x0 - ox) / heat.cell), 0)
    part_of = heat.grid[first[0] : int((y1 - oy) / heat.cell) + 1, first[1] : int((x1 - ox) / heat.cell) + 1]
    rows, columns = np.nonzero(~np.isnan(part_of))
    x, y = ox + (columns + first[1] + 0.5) * heat.cell, oy + (rows + first[0] + 0.5) * heat.cell
    return part_of[rows, columns][shapely.contains_xy(part, x, y)]


def threshold_of(values: np.ndarray, *, value: float | None = None, percentile: float | None = None) -> float | None:
    """The threshold of regions: a value, or a percentile of the slide's patches; None for no regions.

    Raises:
        SlideError: both are given, or no percentile.
    """
    if value is not None and percentile is not None:
        raise SlideError(f"regions above value {value:g} and percentile {percentile:g}: give one of both")
    if percentile is None:
        return None if value is None else float(value)
    if not 0 <= percentile <= 100:
        raise SlideError(f"regions above percentile {percentile}: choose 0 to 100")
    return float(np.percentile(np.asarray(values)[np.isfinite(values)], percentile))


def write_features(path: Path, features: Iterable[dict[str, Any]]) -> None:
    """A FeatureCollection, written as it comes, whole or not at all.

    Raises:
        OutputError: the disk refuses.
    """

    def pieces() -> Iterator[bytes]:
        yield b'{"type":"FeatureCollection","features":['
        before = b"\n"
        for one in features:
            yield before + orjson.dumps(one)
            before = b",\n"
        yield b"\n]}\n"

    write_whole(path, pieces())
