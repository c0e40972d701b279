"""Features are drawn over their own slide and no other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from slides.belongs import features_of, read_belonging
from slides.errors import SlideError
from slides.identity import identity
from slides.open import open_slide
from tests.slides.runs import features
from tests.slides.toys import toy_slide

FOLDER = "20x_64px_0px_overlap/features_toy"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A slide, and the features that were extracted from it."""
    slide = toy_slide(tmp_path / "s.svs", 800, 700, downsamples=(1,)).path
    features([slide], tmp_path / "out")
    return slide, features_of(tmp_path / "out" / FOLDER, "s")


def read(slide: Path, path: Path, name: str = "s") -> tuple:
    with open_slide(slide) as opened:
        return read_belonging(path, opened, name)


def test_own_features_are_taken(pair: tuple[Path, Path], tmp_path: Path) -> None:
    found, coords, side, about = read(*pair)
    assert len(found) == len(coords) > 10 and side == 128 and about["slide_identity"] == identity(pair[0])
    # Renamed, or under another name in the cohort: the content tells.
    moved = pair[0].rename(tmp_path / "renamed.svs")
    assert len(read(moved, pair[1], "patient-7")[0]) == len(found)


def test_a_slide_of_the_same_name_and_size_is_another(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = toy_slide(tmp_path / "other/s.svs", 800, 700, seed=5, downsamples=(1,)).path
    with pytest.raises(SlideError, match="another file than"):
        read(other, pair[1])


def without_identity(path: Path, change: Callable[[h5py.AttributeManager], None]) -> None:
    with h5py.File(path, "a") as file:
        del file["features"].attrs["slide_identity"]
        change(file["coords"].attrs)


def clam(attrs: h5py.AttributeManager) -> None:
    for name in ("level0_width", "level0_height"):
        del attrs[name]
    attrs["level_dim"], attrs["downsample"] = (400, 350), (2.0, 2.0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda attrs: attrs.__setitem__("name", "t"), "features of slide 't', not of 's'"),
        (lambda attrs: attrs.__setitem__("level0_width", 801), "801 x 700 pixels, s has 800 x 700"),
        (lambda attrs: (clam(attrs), attrs.__setitem__("level_dim", (400, 300))), "800 x 600 pixels"),
    ],
)
def test_other_tools_files_are_checked_by_name_and_size(
    pair: tuple[Path, Path], change: Callable[[h5py.AttributeManager], None], says: str
) -> None:
    without_identity(pair[1], change)
    with pytest.raises(SlideError, match=says):
        read(*pair)


def test_other_tools_own_files_are_taken(pair: tuple[Path, Path]) -> None:
    without_identity(pair[1], clam)
    assert len(read(*pair)[0])


def test_patches_outside_and_none(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with h5py.File(pair[1], "a") as file:
        file["coords"][0] = (800, 0)  # type: ignore[index]
    with pytest.raises(SlideError, match=r"1 of \d+ patches lie outside the 800 x 700 pixels of s, e.g. at \[800, 0\]"):
        read(*pair)
    with h5py.File(tmp_path / "none.h5", "w") as file:
        file["features"], file["coords"] = np.zeros((0, 4)), np.zeros((0, 2), int)
    with pytest.raises(SlideError, match="holds no patch"):
        read(pair[0], tmp_path / "none.h5")
    with pytest.raises(SlideError, match="no features in"):
        features_of(tmp_path, "s")
