"""Patches against openslide and OpenCV to the bit, tiles decoded once, threads that never wait for ever."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import cv2
import numpy as np
import openslide
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slides.geometry import Geometry, geometry
from slides.open import open_slide
from slides.openslides import OpenSlideSlide
from slides.patches import CORRUPT, OK, SPARSE, STATUS, read_patches, reading_order
from slides.pyramid import APERIO, JPEG, LOSSLESS, Encoding, write_array
from slides.reader import Slide
from slides.tiff import TiffSlide
from slides.tiling import grid
from tests.slides import toys
from tests.slides.toys import openslide_level, psnr, rectangle, toy_slide

T = TypeVar("T")
SIZE = 32
ENCODINGS = {"jpeg": JPEG, "rgb": APERIO, "deflate": LOSSLESS, "lzw": Encoding("lzw"), "none": Encoding("none")}
# Aligned with tiles or not, of level 0 and 1, whole and broken scales, more and less than the slide has.
REQUESTS: dict[str, dict[str, Any]] = {
    "half": {"mpp": 0.5},
    "own": {"mpp": None},
    "level 1": {"mpp": 1.0},
    "below level 1": {"mpp": 2.0},
    "broken": {"mpp": 0.68},
    "eighth": {"mpp": 0.25 * 3.2},
    "finer": {"mpp": 0.22},
}


class Counted:
    """A slide whose reads of tiles are counted, with how many pixel arrays are alive at once."""

    def __init__(self, slide: Slide) -> None:
        self.slide, self.reads, self.lock = slide, Counter[tuple[int, ...]](), threading.Lock()
        self.alive = self.most = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.slide, name)

    def read_tile(self, *arguments: int) -> np.ndarray | None:
        pixels = self.slide.read_tile(*arguments)
        with self.lock:
            self.reads[arguments] += 1
            if pixels is not None:
                self.alive += 1
                self.most = max(self.most, self.alive)
                weakref.finalize(pixels, self._died)
        return pixels

    def _died(self) -> None:
        self.alive -= 1


def read(slide: Slide, wanted: Geometry, coords: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """All pixels and statuses, with the chunks' order and sizes checked."""
    chunks = list(read_patches(slide, wanted, coords, lambda pixels, status: pixels, **options))
    assert [one.first for one in chunks] == list(range(0, len(coords), options.get("chunk", 16)))
    assert sum(len(one.status) for one in chunks) == len(coords)
    return np.concatenate([one.value for one in chunks]), np.concatenate([one.status for one in chunks])


def expected(whole: np.ndarray, wanted: Geometry, x: int, y: int, downsample: float) -> np.ndarray:
    """openslide's pixels, resized as anyone would."""
    part = rectangle(whole, round(x / downsample), round(y / downsample), wanted.read, wanted.read)
    if wanted.read == wanted.size:
        return part
    how = cv2.INTER_AREA if wanted.read > wanted.size else cv2.INTER_CUBIC
    return cv2.resize(part, (wanted.size, wanted.size), interpolation=how)


def within(seconds: float, work: Callable[[], T]) -> T:
    """Run it in a thread, so that a deadlock is a failure and not the end of the tests."""
    done: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "deadlock"
    if errors:
        raise errors[0]
    return done[0]


def idle() -> bool:
    return not any(thread.name.startswith("patches") for thread in threading.enumerate())


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Slide, list[np.ndarray]]]]:
    """Each encoding, 701 x 523 at 0.25: open, and its levels as openslide reads them."""
    folder, made = tmp_path_factory.mktemp("slides"), {}
    for name, encoding in ENCODINGS.items():
        toy = toy_slide(folder / f"{name}.svs", 701, 523, tile_size=64, encoding=encoding, downsamples=(1, 4))
        made[name] = (open_slide(toy.path), [openslide_level(toy.path, level) for level in (0, 1)])
    yield made
    for slide, _ in made.values():
        slide.close()


@settings(max_examples=25, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_exact_patches_are_openslide_and_area_averaging_to_the_bit(
    slides: dict[str, tuple[Slide, list[np.ndarray]]], name: str, threads: int, data: st.DataObject
) -> None:
    """Anywhere, in any order, twice, half outside or wholly, in chunks of any size."""
    slide, wholes = slides[name]
    wanted = geometry(slide, size=SIZE, **REQUESTS[data.draw(st.sampled_from(list(REQUESTS)))])
    along = [st.integers(-150 // wanted.snap, (side + 60) // wanted.snap) for side in slide.size]
    coords = np.array(data.draw(st.lists(st.tuples(*along), min_size=1, max_size=40))) * wanted.snap
    chunk = data.draw(st.integers(1, 9))
    got, status = read(slide, wanted, coords, exact=True, threads=threads, chunk=chunk)
    assert (status == OK).all()
    downsample = slide.levels[wanted.level].downsample
    for patch, (x, y) in zip(got, coords.tolist(), strict=True):
        assert np.array_equal(patch, expected(wholes[wanted.level], wanted, x, y, downsample))


@pytest.mark.parametrize("name", ["jpeg", "rgb"])
@pytest.mark.parametrize("overlap", [0, 16, 11])
@pytest.mark.parametrize("request_", ["half", "own", "below level 1", "broken", "eighth"])
def test_grids_with_and_without_overlap(
    slides: dict[str, tuple[Slide, list[np.ndarray]]], name: str, overlap: int, request_: str
) -> None:
    slide, wholes = slides[name]
    wanted = geometry(slide, size=SIZE, overlap=overlap, **REQUESTS[request_])
    coords = grid(slide.size, wanted.side, wanted.step, snap=wanted.snap, origin=(3 * wanted.snap, 0))
    coords = coords[reading_order(coords, wanted)]
    got, _ = read(slide, wanted, coords, exact=True, threads=2)
    downsample = slide.levels[wanted.level].downsample
    for patch, (x, y) in zip(got, coords.tolist(), strict=True):
        assert np.array_equal(patch, expected(wholes[wanted.level], wanted, x, y, downsample))


@pytest.fixture(scope="module")
def textured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide with detail everywhere, fine enough that decoding at half scale could show."""
    pixels = toys.toy_pixels(1024, 768)[0].astype(float)
    detail = np.random.default_rng(0).normal(0, 30, (768, 1024, 3))
    pixels = np.clip(pixels * 0.8 + cv2.GaussianBlur(detail, (0, 0), 1.0), 0, 255).astype(np.uint8)
    return write_array(tmp_path_factory.mktemp("textured") / "a.svs", pixels, mpp=0.25, downsamples=(1,))


@pytest.mark.parametrize("mpp", [0.5, 1.0, 2.0])
def test_scaled_decoding_is_close_to_exact_and_leaves_no_seam(textured: Path, mpp: float) -> None:
    with open_slide(textured) as slide:
        wanted = geometry(slide, size=64, mpp=mpp)
        assert wanted.reduce == mpp / 0.25
        coords = grid((1024 - 600, 768 - 600), wanted.side, 100, snap=wanted.snap) + 8  # borders run through patches
        quick, status = read(slide, wanted, coords)
        exact, _ = read(slide, wanted, coords, exact=True)
    assert (status == OK).all() and psnr(quick, exact) > 40
    off = np.abs(quick.astype(int) - exact)
    assert off.max() <= 20
    # Columns and rows at which one tile ends and the next begins, and all others.
    at = (coords[:, :1] / wanted.reduce + np.arange(64)).astype(int) % (256 // wanted.reduce)
    seam = (at == 0) | (at == 256 // wanted.reduce - 1)
    assert seam.any()
    columns = off.mean((1, 3))
    assert columns[seam].mean() < 1.25 * columns[~seam].mean() + 0.1


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize(("overlap", "origin"), [(0, 0), (0, 10), (16, 0), (24, 6)])
@pytest.mark.parametrize("exact", [False, True])
def test_each_stored_tile_is_decoded_once(
    slides: dict[str, tuple[Slide, list[np.ndarray]]], threads: int, overlap: int, origin: int, exact: bool
) -> None:
    counted = Counted(slides["jpeg"][0])
    slide = cast(Slide, counted)
    wanted = geometry(slide, size=SIZE, mpp=0.5, overlap=overlap)
    coords = grid(slide.size, wanted.side, wanted.step, snap=wanted.snap, origin=(origin, origin))
    coords = coords[reading_order(coords, wanted)]
    within(60, lambda: read(slide, wanted, coords, threads=threads, chunk=5, exact=exact))
    assert counted.reads == {(0, x, y, 1 if exact else 2): 1 for x in range(11) for y in range(9)}


@pytest.mark.parametrize("threads", [1, 3])
def test_tiles_are_dropped_once_nobody_needs_them(
    slides: dict[str, tuple[Slide, list[np.ndarray]]], threads: int
) -> None:
    """Of 99 tiles about two rows of eleven are needed at a time, and what the threads have in hand."""
    counted = Counted(slides["jpeg"][0])
    slide = cast(Slide, counted)
    wanted = geometry(slide, size=SIZE, mpp=0.5, overlap=16)
    coords = grid(slide.size, wanted.side, wanted.step, snap=wanted.snap, origin=(10, 10))
    coords = coords[reading_order(coords, wanted)]
    for _ in read_patches(slide, wanted, coords, lambda pixels, status: None, threads=threads, chunk=5):
        pass
    gc.collect()
    assert counted.alive == 0 and counted.most < 55


def test_reading_order_keeps_neighbours_together() -> None:
    wanted = Geometry(256, 0, 512, 2, 512.0, 512.0, 2, 0.5, 0.5)
    coords = grid((40_000, 3_000), wanted.side, wanted.step)
    shuffled = np.random.default_rng(0).permutation(coords)
    ordered = shuffled[reading_order(shuffled, wanted)]
    assert sorted(map(tuple, ordered.tolist())) == sorted(map(tuple, coords.tolist()))
    assert ((np.diff(ordered[:, 0] // 16_384)) >= 0).all()  # strips, left to right
    for strip in range(3):
        part = ordered[ordered[:, 0] // 16_384 == strip]
        rows = part[:, 1] * 100_000 + part[:, 0]
        assert (np.diff(rows) > 0).all()  # and rows in them


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("request_", ["half", "own", "broken"])
def test_a_corrupt_tile_is_a_status_and_its_neighbours_are_bit_identical(
    tmp_path: Path, threads: int, request_: str
) -> None:
    toy = toy_slide(tmp_path / "a.svs", 700, 520, tile_size=64)
    with open_slide(toy.path) as slide:
        wanted = geometry(slide, size=SIZE, overlap=8, **REQUESTS[request_])
        coords = grid(slide.size, wanted.side, wanted.step, snap=wanted.snap)
        before, _ = read(slide, wanted, coords)
    toys.break_header(toy.path, 0, 3, 2)
    toys.halve_tile(toy.path, 0, 6, 5)
    toys.empty_tile(toy.path, 0, 1, 4)
    with open_slide(toy.path) as slide:
        chunks = list(read_patches(slide, wanted, coords, lambda pixels, status: pixels, threads=threads, chunk=7))
    after, status = np.concatenate([c.value for c in chunks]), np.concatenate([c.status for c in chunks])

    def touches(column: int, row: int) -> np.ndarray:
        tile = np.array([column, row]) * 64
        return np.all((coords < tile + 64) & (coords + wanted.read > tile), axis=1)

    corrupt = touches(3, 2) | touches(6, 5)
    sparse = touches(1, 4) & ~corrupt
    assert corrupt.any() and sparse.any()
    assert np.array_equal(status, np.where(corrupt, CORRUPT, np.where(sparse, SPARSE, OK)))
    assert [STATUS[k] for k in (OK, CORRUPT, SPARSE)] == ["ok", "corrupt", "sparse"]
    assert np.array_equal(after[status == OK], before[status == OK])
    told = {line for chunk in chunks for line in chunk.broken}
    assert len(told) == 2 and all("a.svs: tile (" in line for line in told)
    for chunk in chunks:
        assert (chunk.status == CORRUPT).any() == bool(chunk.broken)


@pytest.mark.parametrize("threads", [1, 4])
def test_corrupt_places_of_a_format_that_openslide_reads(tmp_path: Path, threads: int) -> None:
    """Its handle repeats the first error for ever; here every other patch is whole, by several threads too."""
    toy = toy_slide(tmp_path / "a.svs", 700, 520, tile_size=64)
    whole = openslide_level(toy.path)
    toys.break_header(toy.path, 0, 3, 2)
    coords = grid((700, 520), 48, 48)
    handle = openslide.OpenSlide(toy.path)
    with OpenSlideSlide(toy.path, handle, mpp=0.25, mpp_source="table") as slide:
        wanted = geometry(slide, size=24, mpp=0.5)
        got, status = within(60, lambda: read(slide, wanted, coords, threads=threads, chunk=3))
    corrupt = ((coords < np.array([256, 192])) & (coords + 48 > np.array([192, 128]))).all(1)
    assert np.array_equal(status == CORRUPT, corrupt)
    for patch, (x, y) in zip(got[~corrupt], coords[~corrupt].tolist(), strict=True):
        assert np.array_equal(patch, expected(whole, wanted, x, y, 1.0))


def test_transparent_places_are_white(tmp_path: Path) -> None:
    path = toys.rgba_slide(tmp_path / "a.tif", 600, 500)
    pixels, tissue, _ = toys.toy_pixels(600, 500)
    with open_slide(path) as slide:
        wanted = geometry(slide, size=50, mpp=0.5)
        coords = grid((600, 500), 50, 50)
        got, status = read(slide, wanted, coords)
    flat = np.where(tissue[..., None], pixels, 255)
    for patch, (x, y) in zip(got, coords.tolist(), strict=True):
        assert np.array_equal(patch, flat[y : y + 50, x : x + 50])
    assert (status == OK).all()


def test_no_patches_and_one(slides: dict[str, tuple[Slide, list[np.ndarray]]]) -> None:
    slide, _ = slides["jpeg"]
    wanted = geometry(slide, size=SIZE, mpp=0.5)
    for threads in (1, 2):
        assert not list(read_patches(slide, wanted, np.zeros((0, 2), int), lambda p, s: p, threads=threads))
        assert len(list(read_patches(slide, wanted, np.zeros((1, 2), int), lambda p, s: p, threads=threads))) == 1


def test_then_may_keep_its_pixels(slides: dict[str, tuple[Slide, list[np.ndarray]]]) -> None:
    slide, _ = slides["jpeg"]
    wanted = geometry(slide, size=SIZE, mpp=0.5)
    coords = grid(slide.size, wanted.side, wanted.step)
    kept: list[np.ndarray] = []
    copies: list[np.ndarray] = []
    for _ in read_patches(slide, wanted, coords, lambda p, s: (kept.append(p), copies.append(p.copy())), threads=1):
        pass
    assert all(np.array_equal(one, two) for one, two in zip(kept, copies, strict=True))


@pytest.mark.parametrize("taken", [0, 1, 3])
@pytest.mark.parametrize("threads", [2, 4])
def test_a_consumer_that_stops_early_leaves_no_thread_behind(
    slides: dict[str, tuple[Slide, list[np.ndarray]]], threads: int, taken: int
) -> None:
    slide, _ = slides["jpeg"]
    wanted = geometry(slide, size=SIZE, mpp=0.5, overlap=16)
    coords = grid(slide.size, wanted.side, wanted.step, snap=wanted.snap, origin=(10, 10))

    def work() -> None:
        chunks = read_patches(slide, wanted, coords, lambda p, s: p, threads=threads, chunk=2)
        for _ in range(taken):
            next(chunks)
        cast(Any, chunks).close()

    for _ in range(5):
        within(60, work)
    assert idle()


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("where", ["then", "reader"])
def test_an_unforeseen_error_comes_out_as_it_is(
    slides: dict[str, tuple[Slide, list[np.ndarray]]], monkeypatch: pytest.MonkeyPatch, threads: int, where: str
) -> None:
    """Also where other chunks wait for the tile that its thread was to decode."""
    slide, _ = slides["jpeg"]
    wanted = geometry(slide, size=SIZE, mpp=0.5, overlap=16)
    coords = grid(slide.size, wanted.side, wanted.step, snap=wanted.snap, origin=(10, 10))
    calls = Counter[str]()

    def then(pixels: np.ndarray, status: np.ndarray) -> None:
        calls["then"] += 1
        if where == "then" and calls["then"] == 4:
            raise MemoryError("no room")

    read_tile = cast(TiffSlide, slide).read_tile

    def failing(level: int, column: int, row: int, reduce: int = 1) -> np.ndarray | None:
        if where == "reader" and (column, row) == (5, 1):
            raise MemoryError("no room")
        return read_tile(level, column, row, reduce)

    monkeypatch.setattr(slide, "read_tile", failing)

    def work() -> None:
        for _ in read_patches(slide, wanted, coords, then, threads=threads, chunk=2):
            pass

    for _ in range(3):
        calls.clear()
        with pytest.raises(MemoryError, match="no room"):
            within(60, work)
    assert idle()


@settings(max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 5), st.sampled_from([2, 3, 8]))
def test_threads_never_wait_for_ever_whatever_the_order(
    slides: dict[str, tuple[Slide, list[np.ndarray]]], random: Any, chunk: int, threads: int
) -> None:
    slide, _ = slides["jpeg"]
    wanted = geometry(slide, size=SIZE, mpp=0.5, overlap=16)
    coords = grid((300, 300), wanted.side, wanted.step, snap=wanted.snap)
    order = list(range(len(coords)))
    random.shuffle(order)
    counted = cast(Slide, Counted(slide))
    shuffled, _ = within(60, lambda: read(counted, wanted, coords[order], threads=threads, chunk=chunk))
    assert max(cast(Counted, counted).reads.values()) == 1
    straight, _ = read(slide, wanted, coords)
    assert np.array_equal(shuffled, straight[order])
