"""Tiles against openslide's own deep zoom."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import openslide
import openslide.deepzoom
import pytest
from PIL import Image

from medclip.app.tiles import PICTURE, Pyramid, cut, hatched, is_far, picture, tile
from slides.open import open_slide
from slides.pyramid import LOSSLESS
from slides.reader import Slide
from tests.slides.toys import break_header, empty_tile, psnr, toy_slide


def pixels(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiles")
    return toy_slide(folder / "a.svs", 1003, 797, downsamples=(1, 4), tile_size=128, encoding=LOSSLESS).path


@pytest.fixture
def slide(path: Path):
    with open_slide(path) as opened:
        yield opened


def test_the_pyramid_is_openslide_s(path: Path, slide: Slide) -> None:
    ours = Pyramid.of(slide)
    theirs = openslide.deepzoom.DeepZoomGenerator(openslide.OpenSlide(path), tile_size=ours.side, overlap=0)
    assert ours.side == 128 and ours.last == theirs.level_count - 1
    for level in range(ours.first, ours.last + 1):
        assert ours.size(level) == theirs.level_dimensions[level]
        columns, rows = theirs.level_tiles[level]
        assert ours.extent(level, columns - 1, rows - 1) is not None
        assert ours.extent(level, columns, 0) is None and ours.extent(level, 0, rows) is None
    assert theirs.level_tiles[ours.first] == (1, 1) and theirs.level_tiles[ours.first + 1] != (1, 1)
    assert ours.extent(ours.last + 1, 0, 0) is None and ours.extent(ours.last, -1, 0) is None


def test_every_tile_shows_what_openslide_s_shows(path: Path, slide: Slide) -> None:
    ours = Pyramid.of(slide)
    theirs = openslide.deepzoom.DeepZoomGenerator(openslide.OpenSlide(path), tile_size=ours.side, overlap=0)
    for level in range(ours.first, ours.last + 1):
        columns, rows = theirs.level_tiles[level]
        for column in range(columns):
            for row in range(rows):
                wanted = np.asarray(theirs.get_tile(level, (column, row)))
                found = tile(slide, ours, level, column, row)
                assert found is not None and found.broken == 0
                shown = pixels(found.jpeg)
                _, _, width, height = ours.extent(level, column, row) or (0, 0, 0, 0)
                assert shown.shape == (height, width, 3)
                # openslide's last tiles may lack the pixel that a level's size was rounded up by
                assert 0 <= height - wanted.shape[0] <= 1 and 0 <= width - wanted.shape[1] <= 1
                shown = shown[: wanted.shape[0], : wanted.shape[1]]
                assert psnr(shown, wanted) > 30, (level, column, row)  # JPEG, and another filter than openslide's


def test_stored_tiles_are_handed_on_untouched_but_at_the_border(tmp_path: Path) -> None:
    path = toy_slide(tmp_path / "a.svs", 1000, 800, downsamples=(1, 4)).path
    with open_slide(path) as slide:
        pyramid = Pyramid.of(slide)
        for level, number in ((pyramid.last, 0), (pyramid.last - 2, 1)):
            found = tile(slide, pyramid, level, 0, 0)
            stored = slide.tile_jpeg(number, 0, 0)
            inside = slide.levels[number].width >= pyramid.side and slide.levels[number].height >= pyramid.side
            assert found is not None and (found.jpeg == stored) == inside
        border = tile(slide, pyramid, pyramid.last, 3, 3)
        assert border is not None and pixels(border.jpeg).shape == (800 - 768, 1000 - 768, 3)


def test_what_is_broken_is_hatched_and_what_was_not_scanned_is_white(tmp_path: Path) -> None:
    path = empty_tile(break_header(toy_slide(tmp_path / "a.svs", 1000, 800, downsamples=(1,)).path), column=2)
    with open_slide(path) as slide:
        pyramid = Pyramid.of(slide)
        broken, unseen, whole = (tile(slide, pyramid, pyramid.last, column, 1) for column in (1, 2, 0))
        assert broken and unseen and whole
        assert (broken.broken, unseen.broken, whole.broken) == (1, 0, 0)
        assert psnr(pixels(broken.jpeg), hatched(256, 256)) > 30
        assert pixels(unseen.jpeg).min() > 250
        half = tile(slide, pyramid, pyramid.last - 1, 0, 0)  # a quarter of it is the broken one
        assert half is not None and half.broken == 1
        shown, top = pixels(half.jpeg).astype(int), slide.read(0, 0, 0, 256, 256)
        assert np.ptp(shown[130:250, 130:250], axis=-1).max() < 12  # grey
        assert abs(shown[:128, :128].mean() - top.mean()) < 2


def test_a_slide_without_coarse_levels_is_cut_from_one_picture(tmp_path: Path) -> None:
    path = toy_slide(tmp_path / "a.svs", 1600, 1000, downsamples=(1,), tile_size=128).path
    with open_slide(path) as slide:
        pyramid = Pyramid.of(slide)
        assert not is_far(slide, 8) and is_far(slide, 16)
        level = pyramid.last - 4
        direct, from_picture = tile(slide, pyramid, level, 0, 0), cut(picture(slide, PICTURE), pyramid, level, 0, 0)
        assert direct and from_picture
        assert psnr(pixels(direct.jpeg), pixels(from_picture.jpeg)) > 35
