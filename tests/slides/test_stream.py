"""Patches as files: stored tiles handed on without a changed pixel, the rest encoded."""

from __future__ import annotations

import cv2
import numpy as np
import openslide
import pytest
import simplejpeg

from slides.errors import SlideError
from slides.open import open_slide
from slides.patches import CORRUPT, OK, SPARSE, STATUS
from slides.plan import Plan, make_plan
from slides.pyramid import APERIO, JPEG, LOSSLESS
from slides.pyramid import Encoding as Stored
from slides.request import Request
from slides.stream import Encoding, Made, stored_tiles, stream
from tests.slides.toys import break_header, empty_tile, halve_tile, tile_bytes, toy_slide

WHOLE = Request(size=256, mpp=None, tissue="none", remove=(), coverage=0.0)


def run(path, request: Request = WHOLE, **options) -> tuple[Plan, np.ndarray, list[Made]]:
    with open_slide(path) as slide:
        plan, _ = make_plan(slide, "t", request)
        chunks = list(stream(slide, plan, slice(0, len(plan)), **options))
    return plan, np.concatenate([chunk.status for chunk in chunks]), [chunk.value for chunk in chunks]


def files_of(values: list[Made]) -> list[bytes]:
    return [file for value in values for file in value.files or []]


def truth(path, x: int, y: int, side: int) -> np.ndarray:
    region = np.asarray(openslide.open_slide(path).read_region((x, y), 0, (side, side)))
    return np.where(region[..., 3:] == 0, 255, region[..., :3])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("stored", [JPEG, APERIO, Stored(tables=False), Stored(subsampling="444")])
def test_stored_tiles_decode_to_openslide_s_pixels(tmp_path, stored: Stored, threads: int) -> None:
    toy = toy_slide(tmp_path / "t.svs", 1300, 900, encoding=stored)
    plan, status, values = run(toy.path, threads=threads)
    files = files_of(values)
    assert (status == OK).all() and len(files) == 6 * 4
    passed = 0
    for (x, y), file in zip(plan.coords.tolist(), files, strict=True):
        pixels, expected = simplejpeg.decode_jpeg(file, "RGB"), truth(toy.path, x, y, 256)
        if x + 256 <= 1300 and y + 256 <= 900:
            assert np.array_equal(pixels, expected)
            # The compressed pixels are the slide's own bytes.
            assert tile_bytes(toy.path, 0, x // 256, y // 256)[-500:] in file
            passed += 1
        else:  # encoded anew: the padding of the stored tile is not the slide's
            assert np.abs(pixels.astype(int) - expected).mean() < 6 and not np.array_equal(pixels, expected)
    assert passed == 5 * 3


def test_nothing_passes_where_it_may_not(tmp_path) -> None:
    toy = toy_slide(tmp_path / "t.svs", 1300, 900)
    for request in (Request(size=128, mpp=None, tissue="none", remove=()), Request(size=256, mpp=0.3, tissue="none")):
        with open_slide(toy.path) as slide:
            plan, _ = make_plan(slide, "t", request)
            assert stored_tiles(slide, plan, plan.coords) is None
    overlap = Request(size=256, mpp=0.25, overlap=128, tissue="none", remove=(), coverage=0.0)
    with open_slide(toy.path) as slide:
        plan, _ = make_plan(slide, "t", overlap)
        tiles = stored_tiles(slide, plan, plan.coords)
    assert tiles is not None
    aligned = (plan.coords % 256 == 0).all(axis=1) & (plan.coords + 256 <= (1300, 900)).all(axis=1)
    assert np.array_equal(tiles[:, 0] >= 0, aligned) and 0 < aligned.sum() < len(plan)
    plain = files_of(run(toy.path)[2])
    changed = files_of(run(toy.path, change=lambda pixels: pixels)[2])
    off = files_of(run(toy.path, encoding=Encoding(passthrough=False))[2])
    assert plain != off and changed == off


def test_level_4_of_a_40x_slide_passes_at_1_mpp(tmp_path) -> None:
    toy = toy_slide(tmp_path / "t.svs", 2200, 1400)
    plan, _, values = run(toy.path, Request(size=256, mpp=1.0, tissue="none", remove=(), coverage=0.9))
    assert plan.geometry.level == 1 and len(plan) == 2
    handle = openslide.open_slide(toy.path)
    for (x, y), file in zip(plan.coords.tolist(), files_of(values), strict=True):
        expected = np.asarray(handle.read_region((x, y), 1, (256, 256)))[..., :3]
        assert np.array_equal(simplejpeg.decode_jpeg(file, "RGB"), expected)


@pytest.mark.parametrize("damage", [break_header, halve_tile])
def test_a_corrupt_tile_is_one_patch_with_a_reason(tmp_path, damage) -> None:
    toy = toy_slide(tmp_path / "t.svs", 1300, 900)
    whole = files_of(run(toy.path)[2])
    damage(toy.path, column=2, row=1)
    with open_slide(toy.path) as slide:
        plan, _ = make_plan(slide, "t", WHOLE)
        chunks = list(stream(slide, plan, slice(0, len(plan))))
    status = np.concatenate([chunk.status for chunk in chunks])
    (bad,) = np.flatnonzero(status == CORRUPT)
    assert plan.coords[bad].tolist() == [512, 256] and sum(len(chunk.broken) for chunk in chunks) == 1
    files = [file for chunk in chunks for file in chunk.value.files or []]
    assert files[bad] == b"" and [f for n, f in enumerate(files) if n != bad] == [
        f for n, f in enumerate(whole) if n != bad
    ]


def test_a_tile_that_was_not_scanned_is_white_and_says_so(tmp_path) -> None:
    toy = toy_slide(tmp_path / "t.svs", 1300, 900)
    plan, status, values = run(empty_tile(toy.path, column=2, row=1))
    (sparse,) = np.flatnonzero(status == SPARSE)
    assert plan.coords[sparse].tolist() == [512, 256] and STATUS[SPARSE] == "sparse"
    assert (simplejpeg.decode_jpeg(files_of(values)[sparse], "RGB") == 255).all()


@pytest.mark.parametrize("request_", [WHOLE, Request(size=96, mpp=0.5, tissue="none", remove=())])
def test_png_is_the_very_pixels(tmp_path, request_: Request) -> None:
    toy = toy_slide(tmp_path / "t.svs", 700, 500, encoding=LOSSLESS)
    plan, _, values = run(toy.path, request_, encoding=Encoding("png"), exact=True, want_pixels=True)
    read = int(plan.geometry.side)
    pixels = np.concatenate([value.pixels for value in values if value.pixels is not None])
    padded = np.pad(toy.pixels, ((0, 256), (0, 256), (0, 0)), constant_values=255)
    for (x, y), file, given in zip(plan.coords.tolist(), files_of(values), pixels, strict=True):
        found = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        size = request_.size
        expected = cv2.resize(padded[y : y + read, x : x + read], (size, size), interpolation=cv2.INTER_AREA)
        assert np.array_equal(found, expected) and np.array_equal(given, expected)


def test_the_quality_and_subsampling_are_what_was_asked_for() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    sizes = [len(Encoding(quality=quality, subsampling=s).encode(pixels)) for quality, s in
             ((50, "420"), (90, "420"), (90, "422"), (90, "444"))]  # fmt: skip
    assert sizes == sorted(sizes)
    for subsampling in ("420", "422", "444"):
        header = simplejpeg.decode_jpeg_header(Encoding(subsampling=subsampling).encode(pixels))
        assert header == (64, 64, "YCbCr", subsampling)


@pytest.mark.parametrize("wrong", [{"format": "webp"}, {"quality": 0}, {"quality": 101}, {"subsampling": "411"}])
def test_other_encodings_are_refused(wrong: dict) -> None:
    with pytest.raises(SlideError, match="choose"):
        Encoding(**wrong)
