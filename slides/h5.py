"""CLAM's and TRIDENT's HDF5 files, written so that their readers open them, and read back.

Dataset and attribute names are theirs (peers' files, not their code). Both chunk by single rows; here a chunk is 256
rows, which every HDF5 reader takes as well and which writes 5 x and reads 10 x as fast. What we know beyond them (mpp,
status, coverage) stands beside under names that they do not use.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from slides.errors import SlideError
from slides.files import renamed
from slides.patches import STATUS
from slides.plan import Plan
from slides.request import Request

Layout = Literal["clam", "trident"]
_ROWS = 256


def clam_attributes(plan: Plan, folder: str) -> dict[str, Any]:
    """What CLAM's `coords` carries: the patch is `patch_size` pixels of `patch_level`, whatever it is resized to."""
    one = plan.geometry
    level = plan.levels[one.level]
    return {
        "patch_size": one.read,
        "patch_level": one.level,
        "downsample": (level.downsample, level.downsample),
        "downsampled_level_dim": (level.width, level.height),
        "level_dim": (level.width, level.height),
        "name": plan.slide,
        "save_path": folder,
    }


def trident_attributes(plan: Plan, folder: str) -> dict[str, Any]:
    """What TRIDENT's `coords` carries; its magnifications are 10 / mpp."""
    one = plan.geometry
    return {
        "patch_size": one.size,
        "patch_size_level0": round(one.side),
        "level0_magnification": _magnification(plan.mpp),
        "target_magnification": _magnification(one.target_mpp or one.mpp),
        "overlap": round(one.size - one.step / one.side * one.size),
        "name": plan.slide,
        "savetodir": folder,
        "level0_width": plan.size[0],
        "level0_height": plan.size[1],
    }


def _magnification(mpp: float) -> int | float:
    power = 10 / mpp
    return round(power) if abs(power - round(power)) < 0.05 * power else power


def place(folder: Path, request: Request, layout: Layout) -> Path:
    """Below which the layout keeps coordinates and features: OUT, or TRIDENT's OUT/20x_256px_0px_overlap."""
    if layout == "clam":
        return folder
    power = "native" if request.mpp is None else f"{_magnification(request.mpp):.3g}x"
    return folder / f"{power}_{request.size}px_{request.overlap}px_overlap"


def coords_file(folder: Path, request: Request, layout: Layout, slide: str) -> Path:
    """CLAM's patches/SLIDE.h5 or TRIDENT's 20x_256px_0px_overlap/patches/SLIDE_patches.h5."""
    return place(folder, request, layout) / "patches" / f"{slide}{'' if layout == 'clam' else '_patches'}.h5"


def attributes(layout: Layout, plan: Plan, folder: str) -> dict[str, Any]:
    """The attributes of `coords`: the layout's own, and ours."""
    theirs = clam_attributes(plan, folder) if layout == "clam" else trident_attributes(plan, folder)
    one = plan.geometry
    return theirs | {
        "mpp": one.mpp,
        "target_mpp": one.target_mpp or one.mpp,
        "mpp_source": plan.mpp_source,
        "slide_mpp": plan.mpp,
        "level": one.level,
        "read_size": one.read,
        "patch_size_out": one.size,
        "settings": plan.settings,
    }


def write_coords(path: Path, plan: Plan, status: np.ndarray, layout: Layout) -> None:
    """`coords` with the layout's attributes, and `coverage` and `status` beside it."""
    with renamed(path) as part, h5py.File(part, "w") as file:
        _coords(file, plan, plan.coords, layout, str(path.parent))
        file.create_dataset("coverage", data=plan.coverage.astype(np.float32))
        _status(file, status)


def write_features(
    path: Path,
    plan: Plan,
    rows: np.ndarray,
    features: np.ndarray,
    layout: Layout,
    encoder: str,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """`features` (n, d) float32 and `coords` of the patches that have some.

    Args:
        path: of the file.
        plan: of the slide.
        rows: int64 (n,) numbers of those patches in the plan; corrupt ones have none.
        features: float (n, d).
        layout: CLAM has int32 coordinates, TRIDENT int64.
        encoder: its name.
        extra: more attributes of `features`.
    """
    with renamed(path) as part, h5py.File(part, "w") as file:
        width = features.shape[1]
        data = file.create_dataset(
            "features",
            data=np.ascontiguousarray(features, np.float32),
            chunks=(max(1, min(_ROWS, len(features))), width),
            maxshape=(None, width),
        )
        data.attrs.update({"name": plan.slide, "savetodir": str(path.parent), "encoder": encoder} | dict(extra or {}))
        _coords(file, plan, plan.coords[rows], layout, str(path.parent), np.int32 if layout == "clam" else np.int64)
        file.create_dataset("coverage", data=plan.coverage[rows].astype(np.float32))


def _coords(
    file: h5py.File, plan: Plan, coords: np.ndarray, layout: Layout, folder: str, kind: type = np.int64
) -> None:
    chunks = (max(1, min(_ROWS, len(coords))), 2)
    data = file.create_dataset("coords", data=coords.astype(kind), chunks=chunks, maxshape=(None, 2))
    data.attrs.update(attributes(layout, plan, folder))


def _status(file: h5py.File, status: np.ndarray) -> None:
    data = file.create_dataset("status", data=status.astype(np.uint8))
    data.attrs["values"] = ",".join(STATUS)


def read_coords(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """int64 (n, 2) level-0 coordinates of a file of ours, CLAM's or TRIDENT's, and its attributes.

    Raises:
        SlideError: it is no such file.
    """
    try:
        with h5py.File(path) as file:
            data = file["coords"]
            assert isinstance(data, h5py.Dataset)
            coords, found = data[:].astype(np.int64), dict(data.attrs)
    except (OSError, KeyError, AssertionError) as error:
        raise SlideError(f"{path}: no file of coordinates ({error})") from None
    if coords.ndim != 2 or coords.shape[1] != 2:
        raise SlideError(f"{path}: coords has shape {coords.shape}, not (n, 2)")
    return coords, found


def read_features(path: Path) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """float32 (n, d) features, int64 (n, 2) coordinates, attributes of both (those of `coords` go first).

    Raises:
        SlideError: it is no such file.
    """
    coords, found = read_coords(path)
    with h5py.File(path) as file:
        data = file.get("features")
        if not isinstance(data, h5py.Dataset) or data.ndim < 2 or data.shape[-2] != len(coords):
            raise SlideError(f"{path}: no features for its {len(coords)} coordinates")
        # TRIDENT's may have a batch axis.
        features = np.asarray(data[:], np.float32).reshape(len(coords), data.shape[-1])
        return features, coords, dict(data.attrs) | found


def side_of(path: Path, found: Mapping[str, Any]) -> float:
    """Side of a patch in level-0 pixels, by the attributes of ours, TRIDENT's or CLAM's coordinates.

    Raises:
        SlideError: they do not say.
    """
    if "patch_size_level0" in found:
        return float(found["patch_size_level0"])
    downsample = found.get("downsample", found.get("custom_downsample"))
    if "patch_size" in found and downsample is not None:
        return float(found["patch_size"]) * float(np.ravel(downsample)[0])
    raise SlideError(f"{path}: its coords say neither patch_size_level0 nor patch_size and downsample")
