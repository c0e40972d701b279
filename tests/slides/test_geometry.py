"""Requests in mpp, exact; each hole that was found in another tool has a test of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import openslide
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from slides.errors import SlideError
from slides.geometry import Geometry, geometry
from slides.open import open_slide
from slides.patches import read_patches
from slides.reader import Level, Slide
from slides.tiling import grid
from tests.slides.toys import set_mpp, toy_slide


@dataclass
class Stub:
    """As much of a slide as a geometry needs; remembers where it was read."""

    mpp: float
    levels: tuple[Level, ...]
    jpeg: bool = True
    path: Path = Path("stub.svs")

    def __post_init__(self) -> None:
        self.places: list[tuple[int, int, int]] = []

    def scalable(self, level: int) -> bool:
        return self.jpeg

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        self.places.append((level, x, y))
        return np.zeros((height, width, 3), np.uint8)


def stub(mpp: float, *downsamples: float, tile: int | None = 256, jpeg: bool = True) -> Slide:
    sides = None if tile is None else (tile, tile)
    levels = tuple(Level(int(100_000 / d), int(80_000 / d), d, sides) for d in downsamples or (1.0,))
    return cast(Slide, Stub(mpp, levels, jpeg))


@pytest.mark.parametrize("own", [0.2201, 0.2520, 0.2650, 0.4990, 0.1000])
def test_no_magnification_buckets(own: float) -> None:
    """Taking 0.265 or 0.22 for "40x", and half of it for 20x, yields patches of 0.53 or 0.44."""
    found = geometry(stub(own), size=256, mpp=0.5)
    assert found.mpp == pytest.approx(0.5, rel=0.5 / 256)
    assert found.side * own == pytest.approx(256 * 0.5, abs=own / 2 + 1e-9)
    assert found.mpp == pytest.approx(own * found.read / 256)


def test_a_downsample_of_3_9995_is_4_and_not_3(tmp_path: Path) -> None:
    """int() of openslide's number makes patches a third too wide; here the same file is read, to the pixel."""
    toy = toy_slide(tmp_path / "a.svs", 1599, 1199, rounding="ceil", downsamples=(1, 4))
    with openslide.OpenSlide(toy.path) as theirs:
        assert int(theirs.level_downsamples[1]) == 3
    with open_slide(toy.path) as slide:
        found = geometry(slide, size=64, mpp=1.0)
    assert (found.level, found.read, found.side, found.step, found.mpp) == (1, 64, 256.0, 256.0, 1.0)


def test_an_unknown_mpp_never_becomes_level_0(tmp_path: Path) -> None:
    toy = toy_slide(tmp_path / "a.svs", 300, 200)
    with pytest.raises(SlideError, match="its mpp is not known"):
        open_slide(set_mpp(toy.path, None))


@given(
    st.floats(0.1, 1.0),
    st.lists(st.sampled_from([2.0, 2.5, 3.0, 4.0, 8.0, 16.0, 32.0]), max_size=4, unique=True),
    st.integers(16, 1024),
    st.floats(0.1, 20.0),
    st.booleans(),
)
def test_what_a_patch_covers_is_what_was_asked(
    own: float, levels: list[float], size: int, mpp: float, jpeg: bool
) -> None:
    slide = stub(own, 1.0, *sorted(levels), jpeg=jpeg)
    assume(mpp >= own and size * mpp / own / max(levels, default=1) <= 16_000)
    found = geometry(slide, size=size, mpp=mpp)
    downsample = slide.levels[found.level].downsample
    # Half a pixel of what is decoded, at most; and the geometry agrees with itself.
    assert abs(found.side - size * mpp / own) <= found.reduce * downsample / 2 + 1e-6
    assert found.side == found.read * downsample and found.read % found.reduce == 0
    assert found.mpp == pytest.approx(found.side * own / size)
    # The coarsest level that will do: never one that is too coarse, never a finer one than need be.
    assert found.level == 0 or downsample * own <= mpp * 1.001
    assert not any(downsample < one.downsample <= mpp / own for one in slide.levels)
    # Scaled decoding leaves at least as many pixels as are wanted, and twice as strong would not.
    assert found.reduce in (1, 2, 4, 8) and (found.reduce == 1 or jpeg)
    assert found.read >= size * found.reduce or found.reduce == 1
    assert not jpeg or found.reduce == 8 or round(size * mpp / own / downsample) < 2 * found.reduce * size
    assert found.snap == max(1, int(found.reduce * downsample))


@pytest.mark.parametrize(
    ("own", "mpp", "expected"),
    [
        (0.25, 0.5, Geometry(256, 0, 512, 2, 512.0, 512.0, 2, 0.5, 0.5)),
        (0.25, 0.25, Geometry(256, 0, 256, 1, 256.0, 256.0, 1, 0.25, 0.25)),
        (0.25, 1.0, Geometry(256, 1, 256, 1, 1024.0, 1024.0, 4, 1.0, 1.0)),
        (0.25, 2.0, Geometry(256, 1, 512, 2, 2048.0, 2048.0, 8, 2.0, 2.0)),
        (0.25, None, Geometry(256, 0, 256, 1, 256.0, 256.0, 1, 0.25, None)),
        (0.5, 1.5, Geometry(256, 0, 768, 2, 768.0, 768.0, 2, 1.5, 1.5)),
    ],
)
def test_by_hand(own: float, mpp: float | None, expected: Geometry) -> None:
    assert geometry(stub(own, 1.0, 4.0, 16.0), size=256, mpp=mpp) == expected


def test_tiles_that_two_does_not_divide_are_decoded_whole() -> None:
    assert geometry(stub(0.25, tile=250), size=256, mpp=1.0).reduce == 2  # 250 = 2 x 125
    assert geometry(stub(0.25, tile=240), size=256, mpp=2.0).reduce == 8
    assert geometry(stub(0.25, tile=255), size=256, mpp=1.0).reduce == 1
    assert geometry(stub(0.25, tile=None), size=256, mpp=1.0).reduce == 1


def test_tolerance_spares_resampling_and_does_not_hide_the_mpp() -> None:
    exact = geometry(stub(0.499), size=256, mpp=0.5)
    assert (exact.read, exact.mpp) == (257, pytest.approx(0.499 * 257 / 256))
    near = geometry(stub(0.499), size=256, mpp=0.5, tolerance=0.01)
    assert (near.read, near.reduce, near.mpp, near.target_mpp) == (256, 1, 0.499, 0.5)
    # A level just coarser than asked for is taken too, instead of four times the pixels.
    coarser = geometry(stub(0.2505, 1.0, 4.0), size=256, mpp=1.0, tolerance=0.01)
    assert (coarser.level, coarser.read, coarser.mpp) == (1, 256, pytest.approx(1.002))
    assert geometry(stub(0.2505, 1.0, 4.0), size=256, mpp=1.0).level == 0
    # And outside the tolerance nothing changes.
    assert geometry(stub(0.45), size=256, mpp=0.5, tolerance=0.05) == geometry(stub(0.45), size=256, mpp=0.5)


def test_finer_than_the_slide_is_refused_with_the_remedies() -> None:
    with pytest.raises(SlideError) as error:
        geometry(stub(0.5), size=256, mpp=0.25)
    for part in ("stub.svs", "0.5 µm", "0.25 was asked", "mpp=0.5 or more", "upsample=true"):
        assert part in str(error.value)
    made_up = geometry(stub(0.5), size=256, mpp=0.25, upsample=True)
    assert (made_up.read, made_up.side, made_up.mpp) == (128, 128.0, 0.25)
    assert geometry(stub(0.5), size=256, mpp=0.45).read == 230  # a few per cent are only resampling


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"size": 0}, "patches of 0 pixels"),
        ({"overlap": 256}, "overlap must be 0 to size - 1"),
        ({"overlap": -1}, "overlap must be"),
        ({"tolerance": 0.25}, "tolerance"),
        ({"tolerance": -0.1}, "tolerance"),
        ({"tolerance": math.nan}, "tolerance"),
        ({"mpp": 0.0}, "mpp is 0"),
        ({"mpp": -0.5}, "mpp is -0.5"),
        ({"mpp": math.nan}, "mpp is nan"),
        ({"mpp": math.inf}, "mpp is inf"),
        ({"mpp": 1000.0}, r"is 512000 pixels of its coarsest level \(0\.5 µm\): ask for a finer mpp"),
    ],
)
def test_requests_that_make_no_sense(arguments: dict, match: str) -> None:
    with pytest.raises(SlideError, match=match):
        geometry(stub(0.5), **{"size": 256, "mpp": 0.5, **arguments})


def places(slide: Slide, found: Geometry, length: int = 20_000) -> list[int]:
    """Columns of the level at which the patches of a row are really read."""
    row = grid((length, 1), found.side, found.step, snap=found.snap)
    for _ in read_patches(slide, found, row, lambda pixels, status: None):
        pass
    read = cast(Stub, slide).places
    assert {(level, y) for level, _, y in read} == {(found.level, 0)}
    return [x for _, x, _ in read]


@settings(deadline=None, max_examples=60)
@given(st.floats(0.2, 0.6), st.sampled_from([1.0, 1.5, 2.5, 3.0, 3.7, 4.0]), st.integers(40, 300), st.floats(1.0, 4.0))
def test_without_overlap_neighbours_touch_to_the_pixel(own: float, down: float, size: int, times: float) -> None:
    slide = stub(own, down, tile=None)
    found = geometry(slide, size=size, mpp=own * down * times)
    assert set(np.diff(places(slide, found))) <= {found.read}


@settings(deadline=None, max_examples=60)
@given(
    st.floats(0.2, 0.6),
    st.sampled_from([1.0, 2.5, 4.0]),
    st.integers(40, 300),
    st.floats(1.0, 4.0),
    st.floats(0.1, 0.9),
)
def test_neighbours_share_what_was_asked_to_the_pixel(
    own: float, down: float, size: int, times: float, share: float
) -> None:
    overlap = max(1, int(size * share))
    slide = stub(own, down, tile=None)
    found = geometry(slide, size=size, mpp=own * down * times, overlap=overlap)
    steps = np.diff(places(slide, found, 6_000))
    expected = (size - overlap) * found.read / size
    assert np.abs(steps - expected).max(initial=0) < 2
    if len(steps):  # and no drift: all steps together are as long as they should be
        assert abs(steps.sum() - expected * len(steps)) < 2
