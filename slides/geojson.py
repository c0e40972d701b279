"""Masks as GeoJSON and back: what QuPath (0.4 and later) opens and exports, with TRIDENT's column `tissue_id`.

Coordinates are level-0 pixels, x to the right and y down, as both tools have them.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import shapely
import shapely.affinity
from shapely.errors import ShapelyError
from shapely.geometry import mapping, shape
from shapely.geometry.base import BaseGeometry

from slides.errors import SlideError
from slides.files import write_whole
from slides.mask import Mask, areas

_log = logging.getLogger(__name__)
_GEOMETRIES = {
    "Point",
    "MultiPoint",
    "LineString",
    "MultiLineString",
    "Polygon",
    "MultiPolygon",
    "GeometryCollection",
}


def polygons(mask: Mask, simplify: float = 0.0, min_area: float = 0.0) -> list[shapely.Polygon]:
    """The connected parts of a mask as valid polygons with holes, in level-0 pixels, from top to bottom.

    They run along the edges of mask pixels, not through their centres, so their area is the mask's. cv2 finds contours
    through centres; in a mask of twice the size, a pixel has two centres each way, and (centre + 1) // 2 is the corner
    next to it.

    Args:
        mask: the mask.
        simplify: most that an outline may be off, in level-0 pixels (Douglas-Peucker); 0 keeps every step.
        min_area: smaller parts are left out, and smaller holes filled; in level-0 pixels².
    """
    double = cv2.copyMakeBorder(mask.array.view(np.uint8), 0, 1, 0, 1, cv2.BORDER_CONSTANT, value=0)
    double = cv2.resize(double, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    contours, hierarchy = cv2.findContours(double, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    holes: dict[int, list[np.ndarray]] = {}
    for contour, (_, _, _, parent) in zip(contours, hierarchy[0] if len(contours) else [], strict=True):
        if parent >= 0:
            holes.setdefault(int(parent), []).append(_corners(contour))
    found: list[shapely.Polygon] = []
    for number, contour in enumerate(contours):
        if hierarchy[0][number][3] >= 0:
            continue
        # Parts that touch at a corner are one contour to cv2, two polygons here.
        found += areas([shapely.Polygon(_corners(contour), holes.get(number, ()))])
    found = [shapely.affinity.scale(part, mask.downsample, mask.downsample, origin=(0, 0)) for part in found]
    if min_area > 0:
        found = [_without_small_holes(part, min_area) for part in found if part.area >= min_area]
    if simplify > 0:
        found = areas(part.simplify(simplify) for part in found)
    return sorted(found, key=lambda part: (part.bounds[1], part.bounds[0]))


def _corners(contour: np.ndarray) -> np.ndarray:
    """Centres in the doubled mask, int (N, 1, 2), as corners of the mask's pixels, each once: (M, 2)."""
    at = (contour[:, 0] + 1) // 2
    return at[(at != np.roll(at, 1, axis=0)).any(axis=1)]


def _without_small_holes(part: shapely.Polygon, min_area: float) -> shapely.Polygon:
    return shapely.Polygon(part.exterior, [ring for ring in part.interiors if shapely.Polygon(ring).area >= min_area])


def mask_to_geojson(
    mask: Mask,
    *,
    simplify: float | None = None,
    min_area: float = 0.0,
    name: str | None = None,
    color: Sequence[int] = (0, 160, 80),
) -> dict[str, Any]:
    """A FeatureCollection, one annotation per connected part.

    Args:
        mask: the mask.
        simplify: see `polygons`; by default half a mask pixel, which takes the steps off slanted outlines.
        min_area: see `polygons`.
        name: of the class; by default the mask's.
        color: red, green and blue of the class.
    """
    found = polygons(mask, 0.5 * mask.downsample if simplify is None else simplify, min_area)
    classification = {"name": name or mask.name, "color": [int(value) for value in color]}
    return {
        "type": "FeatureCollection",
        "features": [
            {
                "type": "Feature",
                "geometry": mapping(shapely.geometry.polygon.orient(part)),
                "properties": {"objectType": "annotation", "classification": classification, "tissue_id": number},
            }
            for number, part in enumerate(found)
        ],
    }


def write_geojson(path: Path, collection: dict[str, Any]) -> None:
    """Write it whole or not at all.

    Raises:
        OutputError: the disk refuses.
    """
    write_whole(path, json.dumps(collection, separators=(",", ":")).encode())


def read_geojson(path: Path, max_bytes: int = 256_000_000) -> list[tuple[BaseGeometry, str]]:
    """Geometries in level-0 pixels with the name of each one's class, "" where it has none.

    Reads what QuPath exports: a FeatureCollection, a list of features or one feature; and a bare geometry. Features
    without a geometry are passed over.

    Args:
        path: of the file.
        max_bytes: most to read.

    Raises:
        SlideError: it is too large, no GeoJSON, or one of its features is broken (its number, from 1, is named).
    """
    try:
        if (size := path.stat().st_size) > max_bytes:
            raise SlideError(f"{path}: {size / 1e6:.0f} MB of GeoJSON, the limit is {max_bytes / 1e6:.0f}: simplify it")
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise SlideError(f"{path}: cannot be read as GeoJSON ({error})") from None
    if isinstance(content, dict) and content.get("type") == "FeatureCollection":
        content = content.get("features")
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise SlideError(f"{path}: is JSON but not GeoJSON: a FeatureCollection, a list of features or a feature is")
    found: list[tuple[BaseGeometry, str]] = []
    for number, feature in enumerate(content, 1):
        try:
            found += _feature(feature)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RecursionError, ShapelyError) as error:
            raise SlideError(f"{path}: feature {number} of {len(content)} is broken ({error})") from None
    return found


def _feature(feature: Any) -> Iterator[tuple[BaseGeometry, str]]:
    if not isinstance(feature, dict):
        raise ValueError("it is no JSON object")
    bare = feature.get("type") in _GEOMETRIES
    geometry = feature if bare else feature.get("geometry")
    if geometry is None and feature.get("type") == "Feature":
        return
    if not isinstance(geometry, dict) or geometry.get("type") not in _GEOMETRIES:
        kind = geometry.get("type") if isinstance(geometry, dict) else feature.get("type")
        raise ValueError(f"{kind!r} is no kind of geometry")
    with np.errstate(invalid="ignore"):
        made = shape(geometry)
    if not np.isfinite(shapely.get_coordinates(made)).all():
        raise ValueError("a coordinate is not a number")
    yield made, "" if bare else class_name(feature.get("properties") or {})


def class_name(properties: Any) -> str:
    """The class that QuPath, geopandas or TRIDENT wrote into a feature's properties; "" for none."""
    value = properties.get("classification")
    if isinstance(value, str) and value.startswith("{"):  # geopandas writes what is nested as text
        value = json.loads(value)
    if isinstance(value, dict):
        names = value.get("names")
        value = value.get("name") or (": ".join(map(str, names)) if isinstance(names, list) else None)
    value = value or properties.get("name")
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)


def geometries(
    source: Path | str | Iterable[BaseGeometry] | Any,
    *,
    classes: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> list[BaseGeometry]:
    """Polygons of a user's annotations, in level-0 pixels.

    Args:
        source: path of a GeoJSON file, a GeoDataFrame, or shapely geometries.
        classes: keep these alone; by default all that are not excluded.
        exclude: classes that are cut out of the others, such as "Artefact".

    Raises:
        SlideError: as `read_geojson`; or classes are named where there are none.
    """
    wanted, unwanted = (None if classes is None else set(classes)), set(exclude)
    if isinstance(source, str | os.PathLike):
        pairs = read_geojson(Path(source))
    elif hasattr(source, "geometry"):  # a GeoDataFrame or GeoSeries
        pairs = _rows(source)
    else:
        pairs = [(geometry, "") for geometry in source]
    known = {name for _, name in pairs}
    if missing := ((wanted or set()) | unwanted) - known:
        where = source if isinstance(source, str | os.PathLike) else "the annotations"
        if wanted and known <= {""} and pairs:
            raise SlideError(f"{where}: no annotation has a class, {sorted(wanted)} are asked for: leave classes out")
        _log.info("%s: no annotation is of class %s; there are %s", where, sorted(missing), sorted(known))
    keep = [
        part
        for geometry, name in pairs
        if name not in unwanted and (wanted is None or name in wanted)
        for part in areas([geometry])
    ]
    if cut := [part for geometry, name in pairs if name in unwanted for part in areas([geometry])]:
        holes = shapely.union_all(cut)
        keep = areas(part.difference(holes) for part in keep)
    return list(keep)


def _rows(frame: Any) -> list[tuple[BaseGeometry, str]]:
    shapes = list(frame.geometry)
    columns = [name for name in ("classification", "name") if name in getattr(frame, "columns", ())]
    values = zip(*(frame[name] for name in columns), strict=True) if columns else [()] * len(shapes)
    return [
        (geometry, class_name(dict(zip(columns, row, strict=True))))
        for geometry, row in zip(shapes, values, strict=True)
        if geometry is not None
    ]
