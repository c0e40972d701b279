"""Do these features belong to this slide? A map drawn over another one looks as good as a true one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from slides.errors import SlideError
from slides.h5 import read_features, side_of
from slides.identity import identity
from slides.reader import Slide


def features_of(folder: Path, slide: str) -> Path:
    """The file of a slide's features in a folder of TRIDENT's or CLAM's layout: ID.h5 or h5_files/ID.h5.

    Raises:
        SlideError: there is none.
    """
    for path in (folder / f"{slide}.h5", folder / "h5_files" / f"{slide}.h5"):
        if path.is_file():
            return path
    raise SlideError(f"{slide}: no features in {folder} (looked for {slide}.h5 and h5_files/{slide}.h5)")


def read_belonging(path: Path, slide: Slide, name: str) -> tuple[np.ndarray, np.ndarray, float, dict[str, Any]]:
    """Features of an open slide, checked to be of it.

    Args:
        path: of an HDF5 of ours, TRIDENT's or CLAM's.
        slide: open.
        name: of it in the cohort.

    Returns:
        float32 (n, d) features, int64 (n, 2) level-0 coordinates, side of a patch in level-0 pixels, attributes.

    Raises:
        SlideError: see `read_features` and `refuse_another`; it holds no patch.
    """
    features, coords, found = read_features(path)
    if not len(features):
        raise SlideError(f"{path}: holds no patch: there is nothing to draw")
    side = side_of(path, found)
    refuse_another(path, slide, name, coords, side, found)
    return features, coords, side, found


def refuse_another(
    path: Path, slide: Slide, name: str, coords: np.ndarray, side: float, found: Mapping[str, Any]
) -> None:
    """Refuse features of another slide: by identity of the file, by name, by size of level 0, by where patches lie.

    What a file does not say (CLAM's and TRIDENT's know no identity) is not asked of it.

    Raises:
        SlideError: they are another slide's, or of another scan of it.
    """
    known, remedy = text(found.get("slide_identity")), "extract them again, or give the folder of this slide's"
    if known and known != identity(slide.path):
        raise SlideError(f"{path}: features of another file than {slide.path} (size or content differ): {remedy}")
    own = text(found.get("name"))
    if own and not known and own not in (name, slide.path.stem, slide.path.name):
        raise SlideError(f"{path}: features of slide {own!r}, not of {name!r}: {remedy}")
    size = level0_size(found)
    if size is not None and any(abs(a - b) > slack for a, b, slack in zip(size[0], slide.size, size[1], strict=True)):
        raise SlideError(
            f"{path}: features of a slide of {size[0][0]:.0f} x {size[0][1]:.0f} pixels, {name} has "
            f"{slide.size[0]} x {slide.size[1]}: {remedy}"
        )
    outside = ((coords + side <= 0) | (coords >= slide.size)).any(axis=1)
    if outside.any():
        raise SlideError(
            f"{path}: {outside.sum()} of {len(coords)} patches lie outside the {slide.size[0]} x {slide.size[1]} "
            f"pixels of {name}, e.g. at {coords[outside][0].tolist()}: {remedy}"
        )


def text(value: Any) -> str:
    """An attribute of an HDF5 as words; "" for none."""
    if value is None:
        return ""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def level0_size(found: Mapping[str, Any]) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """Level 0 as TRIDENT says it, or CLAM by its level and downsample, and how far rounding may have it off."""
    if "level0_width" in found and "level0_height" in found:
        return (float(found["level0_width"]), float(found["level0_height"])), (0.5, 0.5)
    if "level_dim" in found and "downsample" in found:
        sides = np.ravel(found["level_dim"]).astype(float)
        down = np.broadcast_to(np.ravel(found["downsample"]).astype(float), 2)
        # Some writers have the level's own size here, some level 0's downsampled: a pixel of the level either way.
        return (sides[0] * down[0], sides[1] * down[1]), (down[0] + 0.5, down[1] + 0.5)
    return None
