"""Features: full batches across slides, the values of a plain loop, at anybody's coordinates; kills cost nothing."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest

from slides.errors import SlideError
from slides.extract import Output, extract_slide
from slides.feature_work import FeatureOutput
from slides.features import extract_features
from slides.files import OutputError, alone
from slides.h5 import read_features
from slides.open import open_slide
from slides.patches import read_patches
from slides.plan import make_plan
from slides.request import Request
from tests.slides.runs import REQUEST, ToyEncoder, contents, entries_of, features, killed, leftovers, quiet
from tests.slides.toys import break_header, toy_slide

FOLDER = "20x_64px_0px_overlap/features_toy"


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("features")
    found = [toy_slide(folder / f"s-{n}.svs", 800, 700, seed=n, downsamples=(1,)).path for n in range(3)]
    break_header(found[1])
    return found


@pytest.fixture(scope="module")
def plain(paths: list[Path]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Coordinates and features of a loop, patch by patch."""
    found = {}
    for path in paths:
        with open_slide(path) as slide:
            plan, _ = make_plan(slide, path.stem, REQUEST)
            rows, values = [], []
            for number, coord in enumerate(plan.coords):
                (chunk,) = read_patches(slide, plan.geometry, coord[None], lambda pixels, status: pixels)
                if chunk.status[0] != 1:
                    rows.append(number)
                    values.append(ToyEncoder()(chunk.value)[0])
        found[path.stem] = plan.coords[rows], np.array(values)
    return found


def test_features_are_those_of_a_plain_loop(
    paths: list[Path], plain: dict[str, tuple[np.ndarray, np.ndarray]], tmp_path: Path
) -> None:
    encoder = ToyEncoder()
    report = features(paths, tmp_path, encoder=encoder)
    for name, (coords, values) in plain.items():
        ours, places, found = read_features(tmp_path / FOLDER / f"{name}.h5")
        assert np.array_equal(ours, values) and np.array_equal(places, coords)
        assert (found["encoder"], found["patch_size_level0"], found["mpp"]) == ("toy", 128, 0.5)
    assert [row["status"] for row in report.rows] == ["ok"] * 3
    assert [row["patches"] - row["corrupt"] for row in report.rows] == [len(values) for _, values in plain.values()]
    assert report.rows[1]["corrupt"] > 0 and "tile" in report.rows[1]["reason"]
    assert 0 <= report.waiting <= 1
    # Batches run across slides: all are full but the last.
    total = sum(len(values) for _, values in plain.values())
    assert encoder.batches == [8] * (total // 8) + ([total % 8] if total % 8 else [])
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(("batch_size", "block"), [(1, 1), (5, 3), (1000, 1000), (3, 10)])
def test_batches_and_blocks_do_not_matter(
    paths: list[Path], plain: dict[str, tuple[np.ndarray, np.ndarray]], tmp_path: Path, batch_size: int, block: int
) -> None:
    features(paths, tmp_path, batch_size=batch_size, block=block)
    for name, (coords, values) in plain.items():
        ours, places, _ = read_features(tmp_path / FOLDER / f"{name}.h5")
        assert np.array_equal(ours, values) and np.array_equal(places, coords)


def test_the_index_has_what_the_table_says_of_all_parts(paths: list[Path], tmp_path: Path) -> None:
    entries = [replace(entry, extra={"label": f"L{n}"}) for n, entry in enumerate(entries_of(paths))]
    for part in (entries[:2], entries[2:]):
        extract_features(part, REQUEST, FeatureOutput(str(tmp_path)), ToyEncoder(), meter=quiet())
    table = pq.read_table(tmp_path / FOLDER / "index.parquet").to_pylist()
    assert {row["slide"]: (row["label"], row["dim"], row["file"]) for row in table} == {
        f"s-{n}": (f"L{n}", 48, f"s-{n}.h5") for n in range(3)
    }


def test_clam_trains_on_what_is_written(paths: list[Path], tmp_path: Path) -> None:
    told: list[tuple[str, Path, tuple[int, ...]]] = []

    def tell(plan: Any, path: Path, values: np.ndarray) -> None:
        # The slide is not done before whoever is told of it has done its part.
        assert not (tmp_path / "features_toy/state" / f"{plan.slide}.json").exists()
        told.append((plan.slide, path, values.shape))

    output = FeatureOutput(str(tmp_path), layout="clam")
    extract_features(entries_of(paths[:1]), REQUEST, output, ToyEncoder(), meter=quiet(), written_one=tell)
    path = tmp_path / "features_toy/h5_files/s-0.h5"
    with h5py.File(path, "r") as f:  # as CLAM's datasets do
        values, coords = f["features"][:], f["coords"][:]  # type: ignore[index]
    assert values.dtype == np.float32 and coords.dtype == np.int32 and len(values) == len(coords)  # type: ignore
    assert told == [("s-0", path, values.shape)]  # type: ignore[union-attr]


def as_clam(path: Path, coords: np.ndarray, level: int, size: int, downsample: float) -> None:
    with h5py.File(path, "w") as f:
        data = f.create_dataset("coords", data=coords.astype(np.int64), chunks=(1, 2), maxshape=(None, 2))
        data.attrs["patch_size"], data.attrs["patch_level"] = size, level
        data.attrs["downsample"] = (downsample, downsample)
        data.attrs["downsampled_level_dim"] = data.attrs["level_dim"] = (800, 700)
        data.attrs["name"], data.attrs["save_path"] = path.stem, str(path.parent)


def as_trident(path: Path, coords: np.ndarray, size: int, side: int) -> None:
    with h5py.File(path, "w") as f:
        data = f.create_dataset("coords", data=coords.astype(np.int64), chunks=(1, 2), maxshape=(None, 2))
        data.attrs["patch_size"], data.attrs["patch_size_level0"] = size, side
        data.attrs["level0_magnification"], data.attrs["target_magnification"] = 40, 20
        data.attrs["overlap"], data.attrs["name"], data.attrs["savetodir"] = 0, path.stem, str(path.parent)
        data.attrs["level0_width"], data.attrs["level0_height"] = 800, 700


@pytest.mark.parametrize("tool", ["clam", "trident", "ours"])
def test_features_at_other_tools_coordinates_are_ours(
    paths: list[Path], plain: dict[str, tuple[np.ndarray, np.ndarray]], tmp_path: Path, tool: str
) -> None:
    given = tmp_path / "given"
    given.mkdir()
    for path in (paths[0], paths[2]):
        coords, _ = plain[path.stem]
        if tool == "clam":
            as_clam(given / f"{path.stem}.h5", coords, 0, 128, 1.0)
        elif tool == "trident":
            as_trident(given / f"{path.stem}_patches.h5", coords, 64, 128)
        else:
            output = Output(str(tmp_path / "extracted"), ("coords",), drawings=False)
            extract_slide(entries_of([path])[0], REQUEST, output)
    if tool == "ours":
        given = tmp_path / "extracted/20x_64px_0px_overlap/patches"
    report = features(paths, tmp_path / "out", coords=str(given))
    for path in (paths[0], paths[2]):
        ours, places, _ = read_features(tmp_path / "out" / FOLDER / f"{path.stem}.h5")
        assert np.array_equal(places, plain[path.stem][0]) and np.array_equal(ours, plain[path.stem][1])
    assert [row["status"] for row in report.rows] == ["ok", "failed", "ok"]
    assert "s-1: no coordinates in" in report.rows[1]["reason"]


def test_coordinates_of_another_slide_are_a_failed_row(paths: list[Path], tmp_path: Path) -> None:
    as_trident(tmp_path / "s-0.h5", np.array([[5000, 0]]), 64, 128)
    (tmp_path / "s-1.h5").write_bytes(b"no HDF5")
    as_trident(tmp_path / "s-2.h5", np.zeros((0, 2)), 64, 128)
    rows = features(paths, tmp_path / "out", coords=str(tmp_path)).rows
    assert [row["status"] for row in rows] == ["failed", "failed", "empty"]
    assert "is it another slide's?" in rows[0]["reason"] and "no file of coordinates" in rows[1]["reason"]


def test_zarr_equals_hdf5(paths: list[Path], tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    features(paths, tmp_path / "h5")
    features(paths, tmp_path / "zarr", format="zarr")
    for path in paths:
        group = zarr.open_group(str(tmp_path / "zarr" / FOLDER / f"{path.stem}.zarr"), mode="r")
        values, coords, found = read_features(tmp_path / "h5" / FOLDER / f"{path.stem}.h5")
        assert np.array_equal(group["features"][:], values) and np.array_equal(group["coords"][:], coords)
        assert group.attrs["encoder"] == "toy" and group.attrs["mpp"] == found["mpp"]
        assert group.attrs["patch_size_level0"] == found["patch_size_level0"]
    assert leftovers(tmp_path / "zarr") == []


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 8))])
def test_killed_at_random_it_writes_what_it_would_have_written(paths: list[Path], tmp_path: Path, seed: int) -> None:
    features(paths, tmp_path / "unbroken")
    assert killed("features", paths, tmp_path / "out", seed) >= 3
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken") and leftovers(tmp_path) == []


def test_a_run_that_goes_on_encodes_only_what_is_missing(paths: list[Path], tmp_path: Path) -> None:
    class Breaks(ToyEncoder):
        def __call__(self, patches: np.ndarray) -> np.ndarray:
            if len(self.batches) == 5:
                raise RuntimeError("device lost")
            return super().__call__(patches)

    with pytest.raises(RuntimeError, match="device lost"):
        features(paths, tmp_path / "out", encoder=Breaks())
    encoder = ToyEncoder()
    # In the same process: nothing of the first run still holds a lock.
    assert {row["status"] for row in features(paths, tmp_path / "out", encoder=encoder).rows} == {"ok"}
    features(paths, tmp_path / "fresh", encoder=(whole := ToyEncoder()))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    assert sum(whole.batches) - 40 <= sum(encoder.batches) <= sum(whole.batches) - 30  # blocks of ten
    encoder = ToyEncoder()
    features(paths, tmp_path / "out", encoder=encoder)
    assert encoder.batches == []
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc on this machine")
def test_many_finished_slides_hold_no_files_open(tmp_path: Path) -> None:
    path = toy_slide(tmp_path / "t.svs", 600, 500).path
    copies = [path.with_name(f"t{n}.svs") for n in range(40)]
    for copy in copies:
        copy.hardlink_to(path)
    features(copies, tmp_path / "out")
    copies.append(path)  # comes last: its batch is not full before the end

    class Counts(ToyEncoder):
        open_files = 0

        def __call__(self, patches: np.ndarray) -> np.ndarray:
            self.open_files = max(self.open_files, len(list(Path("/proc/self/fd").iterdir())))
            return super().__call__(patches)

    before = len(list(Path("/proc/self/fd").iterdir()))
    features(copies, tmp_path / "out", encoder=(encoder := Counts()), batch_size=1000)
    assert encoder.open_files and encoder.open_files < before + 15


@pytest.mark.parametrize(
    "wrong",
    [
        lambda patches: np.zeros(len(patches)),
        lambda patches: np.zeros((len(patches) + 1, 8)),
        lambda patches: np.zeros((len(patches), 2, 4)),
    ],
)
def test_a_model_of_a_wrong_shape_is_one_line(paths: list[Path], tmp_path: Path, wrong: Any) -> None:
    class Wrong(ToyEncoder):
        def __call__(self, patches: np.ndarray) -> np.ndarray:
            return wrong(patches)

    with pytest.raises(SlideError, match=r"^encoder toy gave \(.*\) for 8 patches, not \(n, d\)$"):
        features(paths, tmp_path, encoder=Wrong())


def test_other_settings_or_another_model_of_the_name_are_refused(paths: list[Path], tmp_path: Path) -> None:
    features(paths[:1], tmp_path)
    before = contents(tmp_path)

    class Retrained(ToyEncoder):
        fingerprint = "other weights"

    for request, options in (
        (replace(REQUEST, coverage=0.9), {}),
        (REQUEST, {"encoder": Retrained()}),
        (REQUEST, {"format": "zarr"}),
        (REQUEST, {"coords": str(tmp_path)}),
    ):
        with pytest.raises(SlideError, match="features_toy holds the output of other settings"):
            features(paths[:1], tmp_path, request, **options)
    assert contents(tmp_path) == before
    features(paths[:1], tmp_path, batch_size=3, block=2)  # how it was computed does not matter
    assert contents(tmp_path) == before


def test_busy_and_bad_slides_are_rows(paths: list[Path], tmp_path: Path) -> None:
    (tmp_path / "bad.svs").write_text("no slide")
    cohort = [paths[0], tmp_path / "bad.svs", tmp_path / "gone.svs", paths[2]]
    with alone(tmp_path / "out" / FOLDER / "state/s-0.lock"):
        rows = features(cohort, tmp_path / "out").rows
    assert [row["status"] for row in rows] == ["busy", "failed", "failed", "ok"]
    assert "another run" in rows[0]["reason"] and "gone.svs" in rows[2]["reason"]
    rows = features(cohort, tmp_path / "out").rows
    assert [row["status"] for row in rows] == ["ok", "failed", "failed", "ok"]


@pytest.mark.parametrize("failing", [0, 1, 3, 6, 9])
def test_a_full_disk_ends_the_run_and_it_goes_on(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    original, number = os.fsync, 0

    def fsync(handle: int) -> None:
        nonlocal number
        number += 1
        if number > failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OutputError, match="make room"):
            features(paths, tmp_path / "out")
    features(paths, tmp_path / "out")
    features(paths, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh") and leftovers(tmp_path / "out") == []


def test_a_slide_without_tissue_is_empty(tmp_path: Path) -> None:
    path = toy_slide(tmp_path / "t.svs", 600, 500).path
    nothing = Request(size=64, mpp=0.5, min_area=1e9)
    (row,) = features([path], tmp_path / "out", nothing).rows
    assert (row["status"], row["reason"], row["patches"]) == ("empty", "no patch has tissue", 0)
    assert features([path], tmp_path / "out", nothing).rows == [row]


@pytest.mark.parametrize("wrong", [{"layout": "x"}, {"format": "pt"}, {"batch_size": 0}, {"block": 0}])
def test_an_output_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SlideError, match=r"choose|at least 1"):
        FeatureOutput("out", **wrong)
