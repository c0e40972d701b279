"""HDF5 as CLAM and TRIDENT read it: their names, their calls, and the pixels that come of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import openslide
import pytest

from slides.errors import SlideError
from slides.h5 import coords_file, place, read_coords, read_features, side_of, write_coords, write_features
from slides.open import open_slide
from slides.patches import read_patches
from slides.plan import Plan, make_plan
from slides.request import Request
from tests.slides.runs import REQUEST
from tests.slides.toys import Toy, toy_slide


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return toy_slide(tmp_path_factory.mktemp("h5") / "t.svs", 1000, 800)


def plan_of(path: Path, request: Request, mpp: float | None = None) -> Plan:
    with open_slide(path, mpp=mpp) as slide:
        return make_plan(slide, path.stem, request)[0]


def status_of(plan: Plan) -> np.ndarray:
    return (np.arange(len(plan)) % 5 == 1).astype(np.uint8)


@pytest.mark.parametrize("mpp", [0.25, 0.5, 1.0, 1.3])
def test_clam_s_loader_gets_our_patches(toy: Toy, tmp_path: Path, mpp: float) -> None:
    plan = plan_of(toy.path, replace(REQUEST, mpp=mpp))
    path = coords_file(tmp_path, REQUEST, "clam", "t")
    write_coords(path, plan, status_of(plan), "clam")
    assert path == tmp_path / "patches" / "t.h5"
    wsi = openslide.open_slide(toy.path)
    with h5py.File(path, "r") as f:  # what Whole_Slide_Bag_FP does
        patch_level = f["coords"].attrs["patch_level"]
        patch_size = f["coords"].attrs["patch_size"]
        dset = f["coords"]
        assert dset.shape[1] == 2 and len(dset) == len(plan)  # type: ignore[union-attr]
        with open_slide(toy.path) as slide:
            for number in (0, len(plan) // 2, len(plan) - 1):
                coord = dset[number]  # type: ignore[index]
                image = wsi.read_region(coord, patch_level, (patch_size, patch_size))  # type: ignore[arg-type]
                ours = plan.coords[number] / slide.levels[plan.geometry.level].downsample
                pixels = slide.read(plan.geometry.level, *map(int, ours), plan.geometry.read, plan.geometry.read)
                theirs = np.asarray(image)
                seen = theirs[..., 3] == 255  # beyond the border openslide has no pixels, we have white
                assert np.array_equal(theirs[seen][:, :3], pixels[seen])
        assert list(dset.attrs["downsample"]) == ([4.0, 4.0] if mpp >= 1 else [1.0, 1.0])
        assert tuple(dset.attrs["level_dim"]) == tuple(dset.attrs["downsampled_level_dim"])
        assert tuple(dset.attrs["level_dim"]) == wsi.level_dimensions[patch_level]  # type: ignore[index]
        assert (dset.attrs["name"], dset.attrs["save_path"]) == ("t", str(path.parent))
        assert np.array_equal(f["status"][:], status_of(plan))  # type: ignore[index]


def test_trident_s_loader_gets_our_patches(toy: Toy, tmp_path: Path) -> None:
    request = replace(REQUEST, overlap=16)
    plan = plan_of(toy.path, request)
    path = coords_file(tmp_path, request, "trident", "t")
    write_coords(path, plan, status_of(plan), "trident")
    assert path == tmp_path / "20x_64px_16px_overlap" / "patches" / "t_patches.h5"
    with h5py.File(path, "r") as f:  # what its patcher takes from a file of coordinates
        attrs, coords = dict(f["coords"].attrs), f["coords"][:]  # type: ignore[index]
    assert coords.dtype == np.int64 and np.array_equal(coords, plan.coords)
    names = ("patch_size", "patch_size_level0", "level0_magnification", "target_magnification", "overlap")
    assert [int(attrs[name]) for name in names] == [64, 128, 40, 20, 16]
    assert (attrs["level0_width"], attrs["level0_height"]) == (1000, 800)
    assert (attrs["name"], attrs["savetodir"]) == ("t", str(path.parent))
    # It reads patch_size_level0 pixels of level 0 and resizes; with us they are the same place.
    wsi = openslide.open_slide(toy.path)
    x, y = (int(v) for v in coords[len(coords) // 2])
    side = int(attrs["patch_size_level0"])
    theirs = np.asarray(wsi.read_region((x, y), 0, (side, side)).convert("RGB"))
    assert np.abs(theirs.astype(int) - toy.pixels[y : y + side, x : x + side]).mean() < 4  # JPEG's
    assert (attrs["mpp"], attrs["read_size"], attrs["level"]) == (0.5, 128, 0)


@pytest.mark.parametrize(
    ("request_", "name"),
    [
        (Request(), "20x_256px_0px_overlap"),
        (Request(size=512, mpp=0.25, overlap=64), "40x_512px_64px_overlap"),
        (Request(mpp=1.0), "10x_256px_0px_overlap"),
        (Request(mpp=4.0), "2.5x_256px_0px_overlap"),
        (Request(mpp=None), "native_256px_0px_overlap"),
    ],
)
def test_trident_s_folders(request_: Request, name: str) -> None:
    assert place(Path("out"), request_, "trident") == Path("out") / name
    assert place(Path("out"), request_, "clam") == Path("out")


@pytest.mark.parametrize(("layout", "kind"), [("clam", np.int32), ("trident", np.int64)])
def test_features_come_back(toy: Toy, tmp_path: Path, layout: Any, kind: type) -> None:
    plan = plan_of(toy.path, REQUEST)
    rows = np.flatnonzero(status_of(plan) == 0)
    values = np.random.default_rng(0).standard_normal((len(rows), 7)).astype(np.float32)
    write_features(tmp_path / "t.h5", plan, rows, values, layout, "toy", {"dim": 7})
    with h5py.File(tmp_path / "t.h5") as f:
        assert f["features"].dtype == np.float32 and f["coords"].dtype == kind  # type: ignore[union-attr]
        assert f["features"].shape == (len(rows), 7) and f["coords"].shape == (len(rows), 2)  # type: ignore[union-attr]
        assert dict(f["features"].attrs) == {
            "name": "t",
            "savetodir": str(tmp_path),
            "encoder": "toy",
            "dim": 7,
        }
    features, coords, found = read_features(tmp_path / "t.h5")
    assert np.array_equal(features, values) and np.array_equal(coords, plan.coords[rows])
    assert found["encoder"] == "toy" and side_of(tmp_path, found) == 128


def test_a_batch_axis_of_trident_s_is_taken(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "t.h5", "w") as f:
        f["features"], f["coords"] = np.arange(12.0).reshape(1, 4, 3), np.zeros((4, 2), int)
    assert np.array_equal(read_features(tmp_path / "t.h5")[0], np.arange(12.0).reshape(4, 3))


@pytest.mark.parametrize(
    ("attributes", "side"),
    [
        ({"patch_size": 256, "patch_size_level0": 512}, 512),
        ({"patch_size": 256, "patch_level": 1, "downsample": (4.0, 4.0)}, 1024),
        ({"patch_size": 256, "custom_downsample": 2}, 512),  # older CLAM
        ({"patch_size": 256, "downsample": (3.9995, 4.0)}, 1023.872),
    ],
)
def test_a_patch_s_side_in_level_0_pixels(attributes: dict[str, Any], side: float) -> None:
    assert side_of(Path("x.h5"), attributes) == pytest.approx(side)


def test_what_is_no_file_of_coordinates_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "t.h5"
    path.write_bytes(b"not HDF5")
    with pytest.raises(SlideError, match=r"t\.h5: no file of coordinates"):
        read_coords(path)
    with h5py.File(path, "w") as f:
        f["other"] = np.zeros(3)
    with pytest.raises(SlideError, match=r"t\.h5: no file of coordinates"):
        read_coords(path)
    with h5py.File(path, "w") as f:
        f["coords"] = np.zeros((3, 3))
    with pytest.raises(SlideError, match=r"shape \(3, 3\), not \(n, 2\)"):
        read_coords(path)
    with h5py.File(path, "w") as f:
        f["coords"], f["features"] = np.zeros((3, 2)), np.zeros((4, 8))
    with pytest.raises(SlideError, match="no features for its 3 coordinates"):
        read_features(path)
    with pytest.raises(SlideError, match="neither patch_size_level0 nor patch_size and downsample"):
        side_of(path, read_coords(path)[1])


def test_cv2_is_what_resizes(toy: Toy) -> None:
    """A patch is CLAM's region, area-averaged: what makes features at CLAM's places those at ours."""
    plan = plan_of(toy.path, REQUEST)
    with open_slide(toy.path) as slide:
        (chunk, *_) = read_patches(slide, plan.geometry, plan.coords[:1], lambda p, s: p, exact=True)
    region = openslide.open_slide(toy.path).read_region(tuple(plan.coords[0].tolist()), 0, (128, 128))
    expected = cv2.resize(np.asarray(region)[..., :3], (64, 64), interpolation=cv2.INTER_AREA)
    assert np.array_equal(chunk.value[0], expected)
