"""The plan of one slide: which patches, where, and why there.

Made once and kept beside the output, so that a run that goes on after a kill does not make it anew.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slides.errors import SlideError
from slides.files import write_whole
from slides.geojson import geometries
from slides.geometry import Geometry, geometry
from slides.mask import Mask, from_geometries, read_png
from slides.overview import Overview, overview
from slides.patches import reading_order
from slides.quality import blur, folds, pen, summary
from slides.reader import Level, Slide
from slides.request import Request, digest
from slides.tiling import tiles
from slides.tissue import tissue_mask

_FORMAT = 1
_MOST_OVERVIEW = 1_500_000  # pixels


@dataclass(frozen=True)
class Plan:
    """What will be read of a slide.

    Args:
        slide: its name in all outputs.
        settings: fingerprint of the request.
        size: (width, height) of level 0.
        mpp: of level 0.
        mpp_source: where that was found.
        levels: of the slide.
        geometry: of the patches.
        coords: int64 (n, 2) level-0 x and y, in reading order.
        coverage: float32 (n,) share of tissue.
        facts: about the slide, for the manifest: share of tissue, quality.
    """

    slide: str
    settings: str
    size: tuple[int, int]
    mpp: float
    mpp_source: str
    levels: tuple[Level, ...]
    geometry: Geometry
    coords: np.ndarray
    coverage: np.ndarray
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.coords)

    def save(self, path: Path) -> None:
        """As .npz without pickles."""
        words = asdict(self)
        del words["coords"], words["coverage"]
        raw = io.BytesIO()
        np.savez(raw, coords=self.coords, coverage=self.coverage, words=json.dumps({"format": _FORMAT} | words))
        write_whole(path, raw.getvalue())

    @classmethod
    def load(cls, path: Path) -> Plan | None:
        """What was saved; None where there is nothing, or nothing whole."""
        try:
            with np.load(path, allow_pickle=False) as file:
                words, coords, coverage = json.loads(str(file["words"])), file["coords"], file["coverage"]
            if words.pop("format") != _FORMAT:
                return None
            words["levels"] = tuple(_level(one) for one in words["levels"])
            words["geometry"] = Geometry(**words["geometry"])
            words["size"] = tuple(words["size"])
            return cls(coords=coords, coverage=coverage, **words)
        except Exception:  # a damaged zip makes its readers raise anything
            return None


def _level(words: dict[str, Any]) -> Level:
    tile = None if words["tile"] is None else (int(words["tile"][0]), int(words["tile"][1]))
    return Level(words["width"], words["height"], words["downsample"], tile)


@dataclass(frozen=True)
class Seen:
    """What a plan was made from, to be drawn and exported.

    Args:
        overview: of the slide.
        tissue: that patches were laid on.
        artefacts: that were cut out of it, by name.
    """

    overview: Overview
    tissue: Mask
    artefacts: dict[str, Mask]


def make_plan(
    slide: Slide, name: str, request: Request, *, mask: Mask | None = None, threads: int = 1
) -> tuple[Plan, Seen]:
    """Find the tissue and lay the patches.

    Args:
        slide: open.
        name: for outputs; also of the user's masks, `request.masks`/NAME.geojson or .png.
        request: which patches.
        mask: the tissue, where the caller knows it.
        threads: for the overview.

    Raises:
        SlideError: the request does not fit the slide, or its mask is missing or broken.
    """
    one = _geometry(slide, request)
    seen = overview(slide, _overview_mpp(slide, request), threads=threads)
    if mask is None and request.masks is not None:
        mask = own_mask(Path(request.masks), name, slide.size, seen.downsample, request.classes, request.exclude)
    if mask is None:
        mask = _found(seen, request)
    artefacts = {kind: Mask(_artefact(kind, seen, mask), seen.downsample, kind) for kind in request.remove}
    for bad in artefacts.values():
        mask = mask.minus(bad)
    # What cannot be decoded is planned, and becomes rows that say so, rather than being taken for glass.
    laid = mask if seen.broken is None else mask | Mask(seen.broken, seen.downsample)
    coords, coverage = tiles(laid, slide.size, one.side, one.step, request.coverage, snap=one.snap)
    order = reading_order(coords, one)
    facts = {"tissue": round(mask.area / (slide.size[0] * slide.size[1]), 4), "broken_tiles": seen.broken_tiles}
    facts |= summary(seen.image, _on_overview(mask, seen), seen.mpp)
    plan = Plan(
        name,
        request.fingerprint(),
        slide.size,
        slide.mpp,
        slide.mpp_source,
        slide.levels,
        one,
        coords[order],
        coverage[order].astype(np.float32),
        facts,
    )
    return plan, Seen(seen, mask, artefacts)


def plan_at(slide: Slide, name: str, request: Request, coords: np.ndarray, side: float) -> Plan:
    """A plan for patches whose places are known: from another tool, or from a table.

    Args:
        slide: open.
        name: for outputs.
        request: its size is that of the patches; its mpp and tissue do not count.
        coords: int64 (n, 2), level-0 x and y.
        side: of a patch in level-0 pixels.

    Raises:
        SlideError: a patch lies outside the slide.
    """
    width, height = slide.size
    if len(coords) and ((coords + side <= 0).any() or (coords >= (width, height)).any()):
        worst = coords[((coords + side <= 0) | (coords >= (width, height))).any(axis=1)][0].tolist()
        raise SlideError(f"{name}: a patch at {worst} is outside its {width} x {height} pixels: is it another slide's?")
    mpp = side * slide.mpp / request.size
    one = geometry(slide, size=request.size, mpp=mpp, upsample=True)
    # Places are whole level-0 pixels of somebody else's choice: where those are no whole pixels of the level or scale
    # that the mpp alone would take, finer ones are read.
    if (coords % one.snap).any():
        read = round(side)
        one = Geometry(request.size, 0, read, 1, float(read), float(read), 1, read * slide.mpp / request.size, mpp)
    order = reading_order(coords, one)
    return Plan(
        name,
        digest([request.fingerprint(), hashlib.sha256(coords.tobytes()).hexdigest(), side]),
        slide.size,
        slide.mpp,
        slide.mpp_source,
        slide.levels,
        one,
        coords[order].astype(np.int64),
        np.full(len(coords), np.nan, np.float32),
    )


def _geometry(slide: Slide, request: Request) -> Geometry:
    return geometry(
        slide,
        size=request.size,
        mpp=request.mpp,
        overlap=request.overlap,
        tolerance=request.tolerance,
        upsample=request.upsample,
    )


def _overview_mpp(slide: Slide, request: Request) -> float:
    """As asked for; coarser for the largest slides, since finding tissue takes some 60 bytes a pixel."""
    area = slide.size[0] * slide.size[1] * slide.mpp**2
    return max(request.tissue_mpp, (area / _MOST_OVERVIEW) ** 0.5)


def _found(seen: Overview, request: Request) -> Mask:
    if request.tissue == "none":  # the whole slide
        return Mask(np.ones(seen.image.shape[:2], bool), seen.downsample)
    found = tissue_mask(
        seen.image,
        seen.mpp,
        request.tissue,
        fill_holes_um2=request.fill_holes,
        min_area_um2=request.min_area,
        pen="pen" in request.remove,
    )
    return Mask(found, seen.downsample)


def _on_overview(mask: Mask, seen: Overview) -> np.ndarray:
    """The mask on the overview's pixels."""
    if mask.array.shape == seen.image.shape[:2]:
        return mask.array
    blank = Mask(np.ones(seen.image.shape[:2], bool), seen.downsample)
    rows, columns = (
        np.minimum(((np.arange(n) + 0.5) * blank.downsample / mask.downsample).astype(int), limit - 1)
        for n, limit in zip(seen.image.shape[:2], mask.array.shape, strict=True)
    )
    return mask.array[np.ix_(rows, columns)]


def _artefact(kind: str, seen: Overview, mask: Mask) -> np.ndarray:
    if kind == "pen":
        return pen(seen.image, seen.mpp)
    tissue = _on_overview(mask, seen)
    return folds(seen.image, tissue) if kind == "folds" else blur(seen.image, seen.mpp, tissue)


def own_mask(
    folder: Path,
    name: str,
    size0: tuple[int, int],
    downsample: float,
    classes: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Mask:
    """The user's mask of a slide: NAME.geojson, NAME.json or NAME.png in a folder.

    Raises:
        SlideError: there is none, or it is broken.
    """
    folder = folder.expanduser()
    for ending in (".geojson", ".json"):
        path = folder / f"{name}{ending}"
        if path.is_file():
            # Half the overview's pixels: outlines are sharper than the overview that nobody looked at.
            found = geometries(path, classes=classes or None, exclude=exclude)
            return from_geometries(found, size0, downsample / 2)
    for ending in (".png", ".tif", ".tiff"):
        path = folder / f"{name}{ending}"
        if path.is_file():
            return read_png(path, size0)
    raise SlideError(f"{name}: no mask in {folder} (looked for {name}.geojson, .json, .png, .tif)")
