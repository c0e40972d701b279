"""A cohort's maps: every file of each slide, finished slides passed over, bad ones told of."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from slides.errors import SlideError
from slides.h5 import read_features
from slides.heat_slide import Look, fingerprint, heat_slide, paths_of
from slides.run import run
from tests.slides.runs import entries_of, features, leftovers, quiet
from tests.slides.toys import toy_slide

FOLDER = "20x_64px_0px_overlap/features_toy"


class First:
    """The first number of a patch's features."""

    name, label, signed = "first", "the first number", False

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, features: np.ndarray, about: Mapping[str, Any], where: str) -> np.ndarray:
        self.asked.append(where)
        return features[:, 0]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Path]:
    folder = tmp_path_factory.mktemp("heat")
    paths = [toy_slide(folder / f"s-{n}.svs", 800, 700, seed=n, downsamples=(1,)).path for n in range(2)]
    features(paths, folder / "out")
    return paths, folder / "out" / FOLDER


def maps(paths: list[Path], stored: Path, out: Path, source: First, look: Look) -> list[dict[str, Any]]:
    mark = fingerprint(look, "first")
    work = functools.partial(heat_slide, features=stored, folder=out, look=look, source=source, settings=mark)
    return run(entries_of(paths), work, out, settings=mark, meter=quiet(len(paths)))


def test_files_of_a_cohort(cohort: tuple[list[Path], Path], tmp_path: Path) -> None:
    paths, stored = cohort
    look = Look(("png", "geojson", "tiff", "parquet", "csv"), threshold_percentile=80, longest=400, smooth=1)
    (tmp_path / "bad.svs").write_text("no slide")
    source = First()
    missing = toy_slide(tmp_path / "lone.svs", 300, 200).path
    everything = [*paths, missing, tmp_path / "bad.svs"]
    rows = maps(everything, stored, tmp_path / "out", source, look)
    assert [row["status"] for row in rows] == ["ok", "ok", "failed", "failed"]
    assert "no features in" in rows[2]["reason"] and "no features in" in rows[3]["reason"]
    assert leftovers(tmp_path / "out") == []
    for path in paths:
        files = paths_of(tmp_path / "out", path.stem, look.save)
        assert all(file.is_file() for file in files.values())
        found, coords, _ = read_features(stored / f"{path.stem}.h5")
        table = pq.read_table(files["parquet"])
        # The table has the values as they are, however the map is smoothed.
        assert np.allclose(table["value"], found[:, 0]) and np.array_equal(table["x"], coords[:, 0])
        lines = files["csv"].read_text().split()
        assert lines[0] == "slide,x,y,side,value" and len(lines) == len(found) + 1
        assert float(lines[1].split(",")[-1]) == pytest.approx(float(found[0, 0]))
    assert rows[0]["regions"] >= 1 and rows[0]["low"] < rows[0]["threshold"] < rows[0]["high"]

    # The same again: nothing is asked for or written anew, but for what a file was lost of, or what had failed.
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.png")}
    source.asked.clear()
    paths_of(tmp_path / "out", "s-1", look.save)["csv"].unlink()
    rows = maps(everything, stored, tmp_path / "out", source, look)
    assert [row["status"] for row in rows] == ["ok", "ok", "failed", "failed"]
    assert [Path(where).stem for where in source.asked] == ["s-1"]
    assert {file.stem for file, then in before.items() if file.stat().st_mtime_ns != then} == {"s-1"}
    with pytest.raises(SlideError, match="other settings"):
        maps(paths, stored, tmp_path / "out", source, Look(alpha=0.5))


def test_other_features_are_drawn_again(cohort: tuple[list[Path], Path], tmp_path: Path) -> None:
    paths, _ = cohort
    features(paths[:1], tmp_path / "one")
    source, stored = First(), tmp_path / "one" / FOLDER
    look = Look(("csv",))
    maps(paths[:1], stored, tmp_path / "out", source, look)
    import h5py

    with h5py.File(stored / "s-0.h5", "a") as file:
        file["features"][0, 0] = 99  # type: ignore[index]
    maps(paths[:1], stored, tmp_path / "out", source, look)
    assert len(source.asked) == 2 and ",99.0" in (tmp_path / "out/values/s-0.csv").read_text()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"save": ()}, "choose of png"),
        ({"save": ("jpg",)}, "choose of png"),
        ({"alpha": 0}, "alpha is 0"),
        ({"longest": 10}, "10 pixels"),
        ({"compression": "lzw"}, "lzw"),
        ({"patches": False}, "would be empty"),
        ({"palette": "jet"}, "choose one of viridis"),
        ({"limits": (1.0, 0.0)}, "must be below"),
        ({"threshold": 1.0, "threshold_percentile": 5.0}, "give one of both"),
    ],
)
def test_looks_that_make_no_sense(options: dict[str, Any], says: str) -> None:
    with pytest.raises(SlideError, match=says):
        Look(**options)


def test_values_around_0_get_colours_around_0() -> None:
    values = np.array([-1.0, 2.0])
    assert Look().scale(values, False).palette == "viridis" and Look().scale(values, True).palette == "RdBu_r"
    assert Look(limits=(0, 1)).scale(values, True).palette == "viridis"  # which RdBu_r could not show
    assert Look(palette="magma").scale(values, True).palette == "magma"
