"""The tile reader against openslide, to the bit, and against files that are broken."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from slides.errors import SlideError, TileError
from slides.open import open_slide
from slides.pyramid import APERIO, JPEG, LOSSLESS, Encoding, write_pyramid
from slides.tiff import TiffSlide
from tests.slides import toys
from tests.slides.toys import openslide_level, psnr, rectangle, toy_pixels, toy_slide

ENCODINGS = {
    "jpeg": JPEG,
    "jpeg 4:2:2": Encoding(subsampling="422"),
    "jpeg 4:4:4": Encoding(subsampling="444"),
    "jpeg rgb": APERIO,
    "jpeg, tables in tiles": Encoding(tables=False),
    "deflate": LOSSLESS,
    "lzw": Encoding("lzw"),
    "none": Encoding("none"),
}


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[TiffSlide, list[np.ndarray]]]:
    """Each encoding, Aperio and generic in turn, 501 x 343: open, and its levels as openslide reads them."""
    folder, made = tmp_path_factory.mktemp("slides"), {}
    for number, (name, encoding) in enumerate(ENCODINGS.items()):
        toy = toy_slide(
            folder / f"{number}.tif", 501, 343, tile_size=64, encoding=encoding, downsamples=(1, 3, 8),
            flavour=("aperio", "generic")[number % 2],
        )  # fmt: skip
        slide = open_slide(toy.path)
        assert isinstance(slide, TiffSlide)
        made[name] = (slide, [openslide_level(toy.path, level) for level in range(3)])
    return made


@settings(max_examples=150, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", ENCODINGS)
def test_any_rectangle_of_any_level_is_openslide_s(
    slides: dict[str, tuple[TiffSlide, list[np.ndarray]]], name: str, data: st.DataObject
) -> None:
    slide, wholes = slides[name]
    level = data.draw(st.integers(0, 2))
    h, w = wholes[level].shape[:2]
    assert (slide.levels[level].width, slide.levels[level].height) == (w, h)
    x, y = data.draw(st.integers(-90, w + 90)), data.draw(st.integers(-90, h + 90))
    width, height = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 150))
    assert np.array_equal(slide.read(level, x, y, width, height), rectangle(wholes[level], x, y, width, height))


def test_beside_the_slide_all_is_white_even_where_a_tile_is_padded(
    slides: dict[str, tuple[TiffSlide, list[np.ndarray]]],
) -> None:
    """501 pixels end in the middle of the eighth tile."""
    slide, _ = slides["jpeg"]
    for x, y in ((502, 0), (511, 340), (0, 345), (-20, 0), (0, -20), (600, 600), (501, 343)):
        assert (slide.read(0, x, y, 16, 16) == 255).all()


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("reduce", [2, 4, 8])
def test_tiles_at_reduced_scale(slides: dict[str, tuple[TiffSlide, list[np.ndarray]]], name: str, reduce: int) -> None:
    slide, _ = slides[name]
    whole, small = slide.read_tile(0, 2, 1), slide.read_tile(0, 2, 1, reduce)
    assert whole is not None and small is not None
    area = cv2.resize(whole, (64 // reduce, 64 // reduce), interpolation=cv2.INTER_AREA)
    assert slide.scalable(0) == name.startswith("jpeg")
    assert psnr(small, area) > (40 if slide.scalable(0) else 99)


def test_predictors(tmp_path: Path) -> None:
    pixels = toy_pixels(300, 200)[0]
    for number, compression in enumerate(("zlib", "lzw")):
        path = tmp_path / f"{number}.tif"
        tifffile.imwrite(path, pixels, tile=(64, 64), compression=compression, predictor=2, photometric="rgb")
        with open_slide(path, mpp=0.5) as slide:
            assert isinstance(slide, TiffSlide)
            assert np.array_equal(slide.read(0, 0, 0, 300, 200), pixels)
            assert np.array_equal(openslide_level(path), pixels)


def test_grey_tiles(tmp_path: Path) -> None:
    for compression in ("zlib", "jpeg"):
        grey = np.ascontiguousarray(toy_pixels(300, 200)[0][..., 1])
        path = tmp_path / f"{compression}.tif"
        tifffile.imwrite(path, grey, tile=(64, 64), compression=compression, photometric="minisblack")
        with open_slide(path, mpp=0.5) as slide, tifffile.TiffFile(path) as tiff:
            assert isinstance(slide, TiffSlide)
            expected = tiff.pages.first.asarray()[..., None].repeat(3, 2)
            assert np.array_equal(slide.read(0, 0, 0, 300, 200), expected)


@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha"])
def test_transparent_is_white_and_half_transparent_is_mixed(tmp_path: Path, kind: str) -> None:
    """By Porter and Duff's "over" on white, also where colours are stored multiplied by alpha."""
    rng = np.random.default_rng(0)
    alpha = rng.integers(0, 256, (100, 120, 1))
    colour = rng.integers(0, 256, (100, 120, 3))
    alpha[:20], alpha[20:40] = 0, 255
    if kind == "assocalpha":
        colour = colour * alpha // 255
    over = (colour if kind == "assocalpha" else colour * alpha / 255) + 255 - alpha
    path = tmp_path / "a.tif"
    pixels = np.concatenate([colour, alpha], -1).astype(np.uint8)
    tifffile.imwrite(path, pixels, tile=(64, 64), compression="zlib", photometric="rgb", extrasamples=[kind])
    with open_slide(path, mpp=0.5) as slide:
        got = slide.read(0, 0, 0, 120, 100)
    assert (got[:20] == 255).all() or kind == "assocalpha"
    assert np.array_equal(got[20:40], colour[20:40])
    assert np.abs(got - over).max() <= 0.5


def test_a_fourth_channel_that_is_no_alpha_hides_nothing(tmp_path: Path) -> None:
    pixels = np.dstack([toy_pixels(120, 100)[0], np.zeros((100, 120), np.uint8)])
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels, tile=(64, 64), compression="zlib", photometric="rgb", extrasamples=["unspecified"])
    with open_slide(path, mpp=0.5) as slide:
        assert np.array_equal(slide.read(0, 0, 0, 120, 100), pixels[..., :3])


def test_the_toy_with_alpha_is_tissue_on_white(tmp_path: Path) -> None:
    path = toys.rgba_slide(tmp_path / "a.tif")
    pixels, tissue, _ = toy_pixels(600, 500)
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx(0.5)
        assert np.array_equal(slide.read(0, 0, 0, 600, 500), np.where(tissue[..., None], pixels, 255))


@pytest.mark.parametrize("resolutions", [6, 1])
def test_jpeg_2000_is_averaged_however_many_resolutions_it_has(tmp_path: Path, resolutions: int) -> None:
    """Leaving wavelets out is quick, but shifts the picture by a quarter of a pixel, and may not be possible."""
    pixels = toy_pixels(256, 128)[0]

    def tile(level: int, column: int, row: int) -> bytes:
        part = np.ascontiguousarray(pixels[row * 128 :, column * 128 : column * 128 + 128])
        return bytes(imagecodecs.jpeg2k_encode(part, codecformat="j2k", reversible=True, resolutions=resolutions))

    path = write_pyramid(
        tmp_path / "a.svs", (256, 128), tile, mpp=0.5, tile_size=128, downsamples=(1,), encoding=Encoding("jpeg2000")
    )
    with open_slide(path) as slide:
        assert isinstance(slide, TiffSlide) and not slide.scalable(0)
        assert np.array_equal(slide.read(0, 0, 0, 256, 128), pixels)
        for reduce in (2, 4, 8):
            small = slide.read_tile(0, 1, 0, reduce)
            area = cv2.resize(pixels[:, 128:], (128 // reduce,) * 2, interpolation=cv2.INTER_AREA)
            assert small is not None and np.array_equal(small, area)
    with open_slide(path, exact=True) as slide:
        assert not isinstance(slide, TiffSlide) and np.array_equal(slide.read(0, 0, 0, 256, 128), openslide_level(path))


@pytest.mark.parametrize(
    ("breaker", "why"),
    [
        (toys.break_header, "begins with 00000000, no JPEG"),
        (toys.halve_tile, "ends early"),
        (lambda path: toys.halve_tile(path, how="short"), "ends early"),
        (toys.misplace_tile, "the file ends after 0 of its"),
    ],
)
def test_a_broken_tile_says_so_and_its_neighbours_are_whole(
    tmp_path: Path, breaker: Callable[[Path], Path], why: str
) -> None:
    toy = toy_slide(tmp_path / "broken tile.svs", 300, 200, tile_size=64)
    with open_slide(toy.path) as slide:
        whole = slide.read(0, 0, 0, 300, 200)
    breaker(toy.path)
    with open_slide(toy.path) as slide:
        for call in (
            lambda: slide.read_tile(0, 1, 1),
            lambda: slide.read_tile(0, 1, 1, 2),
            lambda: slide.tile_jpeg(0, 1, 1),
            lambda: slide.read(0, 100, 100, 10, 10),
        ):
            with pytest.raises(TileError, match=rf"broken tile\.svs: tile \(1, 1\) of level 0: .*{why}"):
                call()
        for column, row in ((0, 0), (1, 0), (2, 1), (0, 1), (1, 2)):
            tile = slide.read_tile(0, column, row)
            assert tile is not None
            part = whole[row * 64 : row * 64 + 64, column * 64 : column * 64 + 64]
            assert np.array_equal(tile[: part.shape[0], : part.shape[1]], part)


@pytest.mark.parametrize("compression", ["deflate", "lzw", "none", "jpeg2000"])
def test_half_a_tile_of_any_codec(tmp_path: Path, compression: str) -> None:
    toy = toy_slide(tmp_path / "a.svs", 300, 200, tile_size=64, encoding=Encoding(compression))  # pyright: ignore[reportArgumentType]
    toys.halve_tile(toy.path, how="short")
    with open_slide(toy.path) as slide, pytest.raises(TileError, match="tile \\(1, 1\\) of level 0"):
        slide.read_tile(0, 1, 1)


def test_a_tile_without_bytes_was_not_scanned(tmp_path: Path) -> None:
    toy = toy_slide(tmp_path / "a.svs", 300, 200, tile_size=64)
    before = openslide_level(toy.path)
    toys.empty_tile(toy.path)
    with open_slide(toy.path) as slide:
        assert slide.read_tile(0, 1, 1) is None and slide.tile_jpeg(0, 1, 1) is None
        got = slide.read(0, 0, 0, 300, 200)
    assert (got[64:128, 64:128] == 255).all()
    assert np.array_equal(got, openslide_level(toy.path))
    got[64:128, 64:128] = before[64:128, 64:128]
    assert np.array_equal(got, before)


def test_a_tile_that_would_unpack_to_gigabytes(tmp_path: Path) -> None:
    bomb = zlib.compress(bytes(50_000_000), 9)
    path = write_pyramid(
        tmp_path / "a.svs", (64, 64), lambda *_: bomb, mpp=0.5, tile_size=64, downsamples=(1,), encoding=LOSSLESS
    )
    with open_slide(path) as slide, pytest.raises(TileError):
        slide.read_tile(0, 0, 0)


def test_a_stored_tile_of_another_size_does_not_pass_through(tmp_path: Path) -> None:
    small = JPEG.encode(np.zeros((32, 32, 3), np.uint8))
    path = write_pyramid(tmp_path / "a.svs", (64, 64), lambda *_: small, mpp=0.5, tile_size=64, downsamples=(1,))
    with open_slide(path) as slide:
        for call in (slide.tile_jpeg, slide.read_tile):
            with pytest.raises(TileError, match="holds 32 x 32 pixels"):
                call(0, 0, 0)


def test_only_jpeg_passes_through(slides: dict[str, tuple[TiffSlide, list[np.ndarray]]]) -> None:
    for name, (slide, _) in slides.items():
        assert (slide.tile_jpeg(0, 0, 0) is not None) == name.startswith("jpeg")


def test_many_threads_read_what_one_does(slides: dict[str, tuple[TiffSlide, list[np.ndarray]]]) -> None:
    slide, wholes = slides["lzw"]
    places = [(x, y) for y in range(0, 300, 37) for x in range(0, 450, 41)]
    with ThreadPoolExecutor(4) as pool:
        for (x, y), got in zip(places, pool.map(lambda at: slide.read(0, at[0], at[1], 50, 40), places), strict=True):
            assert np.array_equal(got, rectangle(wholes[0], x, y, 50, 40))


def test_a_file_that_vanishes_or_is_closed(tmp_path: Path) -> None:
    toy = toy_slide(tmp_path / "a.svs", 200, 150, tile_size=64)
    with open_slide(toy.path) as slide:
        toys.truncate(toy.path, 0.2)
        with pytest.raises(TileError, match="the file ends after"):
            slide.read(0, 0, 0, 200, 150)
        slide.close()
        with pytest.raises(SlideError):
            slide.read_tile(0, 0, 0)
    assert isinstance(slide, TiffSlide)
    toy.path.unlink()
    with pytest.raises(SlideError, match="cannot be read"):
        TiffSlide(toy.path, slide.planes, mpp=1, mpp_source="", properties={})
