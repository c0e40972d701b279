"""The reader over openslide: white where nothing was scanned, and errors that stay where they arose."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import openslide
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from slides.errors import SlideError, TileError
from slides.openslides import OpenSlideSlide, on_white, properties_of
from tests.slides import toys
from tests.slides.toys import openslide_level, rectangle, toy_slide


def opened(path: Path) -> OpenSlideSlide:
    return OpenSlideSlide(path, openslide.OpenSlide(path), mpp=0.25, mpp_source="table")


@given(arrays(np.uint8, (7, 5, 4)))
def test_alpha_over_white_is_porter_and_duff_s(rgba: np.ndarray) -> None:
    colour, alpha = rgba[..., :3].astype(float), rgba[..., 3:] / 255
    exact = colour * alpha + 255 * (1 - alpha)
    assert np.abs(on_white(rgba) - exact).max() <= 0.5 + 1e-9
    white = Image.new("RGBA", (5, 7), (255, 255, 255, 255))
    pillow = Image.alpha_composite(white, Image.fromarray(rgba)).convert("RGB")
    assert np.abs(on_white(rgba).astype(int) - np.asarray(pillow)).max() <= 1


def test_opaque_pixels_are_untouched_and_contiguous() -> None:
    rgba = np.dstack([np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8), np.full((9, 9), 255, np.uint8)])
    got = on_white(rgba)
    assert np.array_equal(got, rgba[..., :3]) and got.flags.c_contiguous


def test_levels_rectangles_and_borders(tmp_path: Path) -> None:
    toy = toy_slide(tmp_path / "a.svs", 640, 320, tile_size=64, downsamples=(1, 4))
    with opened(toy.path) as slide:
        assert slide.size == (640, 320)
        assert [(one.downsample, one.tile) for one in slide.levels] == [(1, None), (4, None)]
        assert slide.tile_jpeg(0, 0, 0) is None and not slide.scalable(0)
        for level in (0, 1):
            whole = openslide_level(toy.path, level)
            for x, y in ((0, 0), (30, 50), (-10, -20), (600, 300), (150, 70)):
                assert np.array_equal(slide.read(level, x, y, 40, 30), rectangle(whole, x, y, 40, 30))


def test_what_was_not_scanned_is_white_where_dropping_alpha_leaves_black(tmp_path: Path) -> None:
    toy = toys.empty_tile(toy_slide(tmp_path / "a.svs", 300, 200, tile_size=64).path)
    with openslide.OpenSlide(toy) as handle:
        dropped = np.asarray(handle.read_region((64, 64), 0, (64, 64)).convert("RGB"))
    assert (dropped == 0).all()
    with opened(toy) as slide:
        assert (slide.read(0, 64, 64, 64, 64) == 255).all()
        assert (slide.read(0, 1000, 1000, 5, 5) == 255).all()


def test_after_an_error_the_next_read_is_right(tmp_path: Path) -> None:
    toy = toy_slide(tmp_path / "a.svs", 300, 200, tile_size=64)
    whole = openslide_level(toy.path)
    toys.break_header(toy.path)
    with openslide.OpenSlide(toy.path) as handle:  # left alone, it never recovers
        for x in (64, 200):
            with pytest.raises(openslide.OpenSlideError):
                handle.read_region((x, 64), 0, (10, 10))
    with opened(toy.path) as slide:
        for _ in range(3):
            with pytest.raises(TileError, match=r"a\.svs: level 0 at \(70, 70\): \S"):
                slide.read(0, 70, 70, 10, 10)
            assert np.array_equal(slide.read(0, 200, 64, 64, 64), rectangle(whole, 200, 64, 64, 64))


def test_one_error_does_not_slow_down_what_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = toys.break_header(toy_slide(tmp_path / "a.svs", 300, 200, tile_size=64).path)
    opens: list[Path] = []
    real = openslide.OpenSlide

    def counted(path: Path) -> openslide.OpenSlide:
        opens.append(path)
        return real(path)

    with opened(toy) as slide:
        monkeypatch.setattr(openslide, "OpenSlide", counted)
        with pytest.raises(TileError):
            slide.read(0, 70, 70, 10, 10)
        assert len(opens) == 2  # one to make sure, one for all later reads
        for x in range(0, 200, 20):
            slide.read(0, x, 130, 10, 10)
        assert len(opens) == 2


def test_an_error_of_another_thread_on_the_same_handle_is_not_ours(tmp_path: Path) -> None:
    """What a thread sees that reads a good place between another one's error and the new handle."""
    toy = toy_slide(tmp_path / "a.svs", 300, 200, tile_size=64)
    whole = openslide_level(toy.path)
    toys.break_header(toy.path)
    handle = openslide.OpenSlide(toy.path)
    with OpenSlideSlide(toy.path, handle, mpp=0.25, mpp_source="table") as slide:
        with pytest.raises(openslide.OpenSlideError):
            handle.read_region((70, 70), 0, (10, 10))
        assert np.array_equal(slide.read(0, 200, 64, 64, 64), rectangle(whole, 200, 64, 64, 64))


def test_threads_that_meet_errors_all_the_time(tmp_path: Path) -> None:
    toy = toy_slide(tmp_path / "a.svs", 300, 200, tile_size=64)
    whole = openslide_level(toy.path)
    toys.halve_tile(toy.path)
    places = [(x, y) for _ in range(4) for y in range(0, 200, 32) for x in range(0, 300, 32)]

    def read(at: tuple[int, int]) -> np.ndarray | None:
        try:
            return slide.read(0, *at, 32, 32)
        except TileError:
            return None

    with opened(toy.path) as slide, ThreadPoolExecutor(4) as pool:
        for (x, y), got in zip(places, pool.map(read, places), strict=True):
            if x // 64 == 1 and y // 64 == 1:
                assert got is None
            else:
                assert got is not None and np.array_equal(got, rectangle(whole, x, y, 32, 32))


def test_a_file_that_has_gone_when_it_is_needed_again(tmp_path: Path) -> None:
    toy = toy_slide(tmp_path / "a.svs", 300, 200, tile_size=64)
    toys.break_header(toy.path)
    with opened(toy.path) as slide:
        toy.path.unlink()
        with pytest.raises(SlideError, match="cannot be opened again") as error:
            slide.read(0, 70, 70, 10, 10)
        assert not isinstance(error.value, TileError)  # it is the end of the slide, not of a patch


@given(st.binary(max_size=6))
def test_property_names_that_are_no_utf_8(name: bytes) -> None:
    """openslide lists such a name and then does not know it."""

    class Odd(dict):
        def __getitem__(self, key: str) -> str:
            if "\ufffd" in key:
                raise KeyError
            return super().__getitem__(key)

    said = {"aperio.MPP": "0.25", name.decode("utf-8", "replace"): "x"}
    handle = cast(openslide.OpenSlide, SimpleNamespace(properties=Odd(said)))
    expected = {key: value for key, value in said.items() if "\ufffd" not in key}
    assert properties_of(handle) == expected
