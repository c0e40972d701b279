"""Patches by number: each is what the slide holds there, whoever asks, in whatever process and order."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from slides.colours import recolour
from slides.dataset import Handles, SlidePatches
from slides.entry import Entry
from slides.errors import SlideError, TileError
from slides.open import open_slide
from slides.patches import read_patches
from slides.plan import make_plan, plan_at
from slides.request import Request
from slides.tiff import TiffSlide
from tests.slides.toys import break_header, empty_tile, toy_pixels, toy_slide

WHOLE = Request(size=96, mpp=0.25, overlap=32, tissue="none", coverage=0.0, remove=())


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("slides")
    return [toy_slide(folder / f"{name}.svs", 700, 500, seed=seed).path for seed, name in enumerate("abc")]


def plain(items: list[dict]) -> list[tuple]:
    return [(i["slide"], i["x"], i["y"], i["status"], i["row"], i["image"].tobytes()) for i in items]


def test_an_item_is_the_rectangle_at_its_place(paths: list[Path]) -> None:
    patches = SlidePatches.of(paths, WHOLE)
    assert len(patches) == 3 * 11 * 8  # (700 - 96) / 64 + 1, rounded up, and likewise 500
    with open_slide(paths[1]) as slide:
        for number in (88, 101, 175):
            item = patches[number]
            assert (item["slide"], item["status"], item["row"]) == ("b", "ok", number - 88)
            assert np.array_equal(item["image"], slide.read(0, item["x"], item["y"], 96, 96))


def test_a_batch_is_its_items_in_the_order_asked_for(paths: list[Path]) -> None:
    patches = SlidePatches.of(paths, Request(size=48, mpp=0.5, tissue="none", coverage=0.0))
    numbers = np.random.default_rng(0).integers(0, len(patches), 60)  # doubles among them, and all slides
    assert len(set(numbers.tolist())) < 60
    assert plain(patches.__getitems__(numbers.tolist())) == plain([patches[int(n)] for n in numbers])
    assert plain([patches[-1]]) == plain([patches[len(patches) - 1]])
    for wrong in (len(patches), -len(patches) - 1):
        with pytest.raises(IndexError):
            patches[wrong]


def test_each_tile_is_decoded_once_in_a_batch(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    patches = SlidePatches.of(paths[:2], WHOLE)
    decoded: Counter[tuple] = Counter()
    original = TiffSlide.read_tile

    def counted(slide: TiffSlide, level: int, column: int, row: int, reduce: int = 1) -> np.ndarray | None:
        decoded[slide.path.name, level, column, row] += 1
        return original(slide, level, column, row, reduce)

    monkeypatch.setattr(TiffSlide, "read_tile", counted)
    order = np.random.default_rng(1).permutation(len(patches)).tolist()
    patches.__getitems__(order)
    assert len(decoded) == 2 * 3 * 2 and set(decoded.values()) == {1}  # tiles of 256 in 700 x 500


@pytest.mark.parametrize(("workers", "method"), [(0, None), (2, "fork"), (1, "spawn")])
def test_torch_loads_it(paths: list[Path], workers: int, method: str | None) -> None:
    patches = SlidePatches.of(paths, WHOLE, handles=2)
    expected = plain([patches[n] for n in range(40)])  # this process has slides open when it forks
    subset = torch.utils.data.Subset(patches, list(range(40)))  # type: ignore[arg-type]
    loader = DataLoader(subset, batch_size=16, num_workers=workers, multiprocessing_context=method)
    rows = []
    for batch in loader:
        assert batch["image"].dtype == torch.uint8
        for k in range(len(batch["slide"])):
            x, y, row = (int(batch[name][k]) for name in ("x", "y", "row"))
            rows.append((batch["slide"][k], x, y, batch["status"][k], row, batch["image"][k].numpy().tobytes()))
    assert rows == expected
    assert plain([patches[39]]) == expected[39:]  # nothing that workers closed was this process's


def test_handles_are_few_and_stay_open_while_used(paths: list[Path]) -> None:
    plans = SlidePatches.of(paths, WHOLE).plans
    slides = [(Entry(path.stem, str(path)), plan) for path, plan in zip(paths, plans, strict=True)]
    handles = Handles(slides, WHOLE, limit=1)
    with handles.lent(0) as (first, _):
        with handles.lent(1) as (second, _), handles.lent(0) as (again, _):
            assert again is first and second is not first
        assert first.read(0, 0, 0, 4, 4).shape == (4, 4, 3)  # over the limit, but in use
    with handles.lent(2) as (third, _):
        pass
    assert list(handles._opened.slides) == [2]
    with handles.lent(2) as (same, _):
        assert same is third
    with handles.lent(0) as (opened, _):
        assert opened is not first
    copy = pickle.loads(pickle.dumps(handles))
    assert ([entry for entry, _ in copy.slides], copy.limit) == ([entry for entry, _ in slides], 1)
    assert not copy._opened.slides
    handles.close()
    assert not handles._opened.slides


def test_corrupt_patches_are_marked_or_raised(tmp_path: Path) -> None:
    path = empty_tile(break_header(toy_slide(tmp_path / "a.svs", 700, 500).path, 0, 1, 1), 0, 0, 0)
    with open_slide(path) as slide:
        plan, _ = make_plan(slide, "a", WHOLE)
    marked = SlidePatches([(Entry("a", str(path)), plan)], WHOLE)
    for item in marked.__getitems__(range(len(marked))):
        x, y = item["x"], item["y"]
        broken, sparse = 160 < x < 512 and y > 160, x < 256 and y < 256
        assert item["status"] == ("corrupt" if broken else "sparse" if sparse else "ok")
        assert (item["image"].min() == 255) == (broken or (x + 96 <= 256 and y + 96 <= 256))
    raising = SlidePatches([(Entry("a", str(path)), plan)], WHOLE, corrupt="raise")
    bad = next(n for n in range(len(plan)) if marked[n]["status"] == "corrupt")
    with pytest.raises(TileError, match=r"a\.svs: tile \(1, 1\) of level 0"):
        raising[bad]
    good = next(n for n in range(len(plan)) if marked[n]["status"] == "ok")
    assert plain([raising[good]]) == plain([marked[good]])  # the slide is not lost with its tile


def test_colours_are_changed_as_the_request_has_it(paths: list[Path], tmp_path: Path) -> None:
    target = tmp_path / "target.png"
    Image.fromarray(toy_pixels(300, 200, seed=9)[0][..., ::-1]).save(target)  # blue where the slides are pink
    request = replace(WHOLE, stain="reinhard", stain_target=str(target))
    asis, stained = SlidePatches.of(paths, WHOLE), SlidePatches.of(paths, request)
    with open_slide(paths[1]) as slide:
        change = recolour(slide, request, stained.plans[1])
    assert change is not None
    for number in sorted(range(88, 176), key=lambda n: asis[n]["image"].mean())[:3]:  # of the second slide, on tissue
        before, after = asis[number]["image"], stained[number]["image"]
        assert np.array_equal(after, change(before[None])[0])
        assert np.abs(before.astype(int) - after).mean() > 10


def test_places_of_somebody_elses_choice(paths: list[Path]) -> None:
    coords = np.asarray([[301, 77], [5, 3], [301, 78]])
    with open_slide(paths[0]) as slide:
        plan = plan_at(slide, "a", Request(size=50), coords, 100)
        (chunk,) = read_patches(slide, plan.geometry, plan.coords, lambda pixels, status: pixels)
    patches = SlidePatches([(Entry("a", str(paths[0])), plan)], Request(size=50))
    assert [(i["x"], i["y"]) for i in patches.__getitems__([0, 1, 2])] == [tuple(c) for c in plan.coords.tolist()]
    assert np.array_equal(np.stack([i["image"] for i in patches.__getitems__([0, 1, 2])]), chunk.value)


def test_what_makes_no_sense_is_refused(paths: list[Path]) -> None:
    small, large = (SlidePatches.of(paths[:1], Request(size=size, mpp=0.5)) for size in (96, 128))
    entry = Entry("a", str(paths[0]))
    with pytest.raises(SlideError, match="96 and 128 pixels: a batch needs one size"):
        SlidePatches([(entry, small.plans[0]), (entry, large.plans[0])])
    with pytest.raises(SlideError, match="corrupt is 'white': choose mark or raise"):
        SlidePatches([], corrupt="white")  # type: ignore[arg-type]
    with pytest.raises(SlideError, match="handles is 0"):
        SlidePatches([], handles=0)
    with pytest.raises(SlideError, match="no such file"):
        SlidePatches.of([paths[0].with_name("none.svs")], WHOLE)
