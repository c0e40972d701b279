"""The slide at low resolution, against averages of its own pixels."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openslide
import pytest

from slides.errors import SlideError
from slides.open import open_slide
from slides.openslides import OpenSlideSlide
from slides.overview import overview
from slides.pyramid import APERIO, JPEG, LOSSLESS, Encoding
from slides.reader import Slide
from tests.slides import toys
from tests.slides.toys import psnr, toy_slide


@pytest.mark.parametrize("downsamples", [(1,), (1, 4), (1, 2, 4, 16)])
@pytest.mark.parametrize("threads", [1, 3])
def test_it_is_the_mean_of_what_it_covers(tmp_path: Path, downsamples: tuple[int, ...], threads: int) -> None:
    toy = toy_slide(tmp_path / "a.svs", 640, 480, tile_size=64, encoding=LOSSLESS, downsamples=downsamples)
    with open_slide(toy.path) as slide:
        seen = overview(slide, 4.0, threads=threads)  # 16 level-0 pixels a pixel
    means = toy.pixels.reshape(30, 16, 40, 16, 3).mean((1, 3))
    assert (seen.downsample, seen.mpp, seen.broken, seen.broken_tiles) == (16, 4.0, None, 0)
    assert np.abs(seen.image - means).max() <= 1.5  # each level has been rounded


@pytest.mark.parametrize("encoding", [JPEG, APERIO, Encoding("jpeg2000", quality=60)])
@pytest.mark.parametrize(
    ("mpp", "size"), [(1.0, (1000, 803)), (3.3, (1001, 803)), (8.0, (999, 777)), (0.37, (500, 401))]
)
def test_any_size_and_scale_is_close_to_area_averaging(
    tmp_path: Path, encoding: Encoding, mpp: float, size: tuple[int, int]
) -> None:
    toy = toy_slide(tmp_path / "a.svs", *size, tile_size=128, encoding=encoding, downsamples=(1,))
    smooth = cv2.GaussianBlur(toy.pixels, (0, 0), 0.25 + mpp * 2)
    with open_slide(toy.path) as slide:
        seen = overview(slide, mpp)
    shape = (round(size[0] * 0.25 / mpp), round(size[1] * 0.25 / mpp))
    assert seen.image.shape == (shape[1], shape[0], 3)
    assert seen.downsample == size[0] / shape[0] and seen.mpp == pytest.approx(mpp, rel=0.02)
    expected = cv2.resize(smooth, shape, interpolation=cv2.INTER_AREA)
    inner = (slice(1, -1), slice(1, -1))
    assert psnr(cv2.GaussianBlur(seen.image, (0, 0), 2)[inner], cv2.GaussianBlur(expected, (0, 0), 2)[inner]) > 32


def test_a_slide_without_tiles_looks_the_same(tmp_path: Path) -> None:
    toy = toy_slide(tmp_path / "a.svs", 640, 480, tile_size=64, encoding=LOSSLESS, downsamples=(1, 4))
    handle = openslide.OpenSlide(toy.path)
    with open_slide(toy.path) as tiled, OpenSlideSlide(toy.path, handle, mpp=0.25, mpp_source="table") as whole:
        for mpp in (0.25, 0.5, 2.0, 4.0):
            one, two = overview(tiled, mpp), overview(whole, mpp, threads=2)
            assert one.image.shape == two.image.shape and one.mpp == two.mpp
            assert np.abs(one.image.astype(int) - two.image).max() <= 1


def test_each_tile_is_read_once_at_the_smallest_scale_that_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = toy_slide(tmp_path / "a.svs", 640, 480, tile_size=64, downsamples=(1, 4))
    with open_slide(toy.path) as slide:
        asked: Counter[tuple[int, ...]] = Counter()
        read_tile = slide.read_tile

        def counted(*arguments: int) -> Any:
            asked[arguments] += 1
            return read_tile(*arguments)

        monkeypatch.setattr(slide, "read_tile", counted)
        overview(slide, 4.0, threads=2)
    assert asked == {(1, column, row, 4): 1 for column in range(3) for row in range(2)}


def test_a_slide_coarser_than_asked_is_taken_as_it_is(tmp_path: Path) -> None:
    toy = toy_slide(tmp_path / "a.svs", 100, 80, encoding=LOSSLESS, downsamples=(1,))
    with open_slide(toy.path, mpp=9.0) as slide:
        seen = overview(slide, 8.0)
    assert (seen.downsample, seen.mpp) == (1, 9.0) and np.array_equal(seen.image, toy.pixels)


def test_broken_and_unscanned_tiles_are_white_and_only_broken_ones_are_marked(tmp_path: Path) -> None:
    toy = toy_slide(tmp_path / "a.svs", 512, 384, tile_size=64, downsamples=(1,), encoding=LOSSLESS)
    with open_slide(toy.path) as slide:
        whole = overview(slide, 2.0).image  # 8 pixels a tile
    toys.halve_tile(toy.path, 0, 2, 3, "short")
    toys.empty_tile(toy.path, 0, 4, 1)
    with open_slide(toy.path) as slide:
        for threads in (1, 2):
            seen = overview(slide, 2.0, threads=threads)
            assert seen.broken is not None and seen.broken_tiles == 1
            expected = np.zeros((48, 64), bool)
            expected[24:32, 16:24] = True
            assert np.array_equal(seen.broken, expected)
            unscanned = np.zeros_like(expected)
            unscanned[8:16, 32:40] = True
            assert (seen.image[expected | unscanned] == 255).all()
            assert np.array_equal(seen.image[~(expected | unscanned)], whole[~(expected | unscanned)])


def test_broken_blocks_of_a_slide_without_tiles(tmp_path: Path) -> None:
    toy = toy_slide(tmp_path / "a.svs", 2500, 400, tile_size=64, downsamples=(1,))
    toys.break_header(toy.path, 0, 36, 1)
    handle = openslide.OpenSlide(toy.path)
    with OpenSlideSlide(toy.path, handle, mpp=0.25, mpp_source="table") as slide:
        seen = overview(slide, 4.0)
    assert seen.broken is not None and seen.broken_tiles == 1
    assert not seen.broken[:, :127].any() and seen.broken[:, 129:].all()  # blocks of 2,048 pixels
    assert np.ptp(seen.image[:, :127]) > 50


def test_nothing_that_can_be_decoded(tmp_path: Path) -> None:
    toy = toy_slide(tmp_path / "a.svs", 100, 80, tile_size=64, downsamples=(1,))
    for row in (0, 1):
        for column in (0, 1):
            toys.break_header(toy.path, 0, column, row)
    with open_slide(toy.path) as slide, pytest.raises(SlideError, match=r"a\.svs: none of its tiles .*no JPEG"):
        overview(slide, 1.0)


def test_too_many_pixels_for_an_overview(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = toy_slide(tmp_path / "a.svs", 200, 150)

    def asked(slide: Slide) -> None:
        monkeypatch.setattr(slide, "size", (200_000, 150_000))
        overview(slide, 0.5)

    with open_slide(toy.path) as slide, pytest.raises(SlideError, match="100000 x 75000 pixels: ask for coarser"):
        asked(slide)
