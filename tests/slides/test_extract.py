"""One slide to disk: the patches are the slide's own pixels, and a run that breaks off goes on as if it had not."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import openslide
import orjson
import pyarrow.parquet as pq
import pytest
import shapely

from slides import extract as extraction
from slides.entry import Entry
from slides.errors import SlideError
from slides.extract import Output, extract_slide
from slides.files import OutputError, alone
from slides.geojson import geometries
from slides.pyramid import LOSSLESS
from slides.request import Request
from slides.save import ShardSaver
from slides.stream import Encoding
from tests.slides.runs import REQUEST, ROOT, contents, entries_of, extract, killed, leftovers
from tests.slides.toys import AWKWARD_NAME, break_header, empty_tile, toy_slide, truncate

DATA = ROOT.parent / "shared" / "data" / "wsi"
real = pytest.mark.skipif(not DATA.is_dir(), reason="the sample data is not beside the checkout")
PNG = Output("", encoding=Encoding("png"))


def members(folder: Path) -> dict[str, bytes]:
    found = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            found |= {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    return found


def check_pixels(path: Path, found: dict[str, bytes]) -> int:
    """Each PNG is openslide's rectangle at the JSON's place, averaged."""
    handle = openslide.open_slide(path)
    count = 0
    for name, raw in found.items():
        if not name.endswith(".json"):
            continue
        known = orjson.loads(raw)
        region = handle.read_region((known["x"], known["y"]), known["level"], (known["read_size"],) * 2)
        region = np.asarray(region)
        assert set(np.unique(region[..., 3])) <= {0, 255}
        pixels = np.where(region[..., 3:] == 0, 255, region[..., :3]).astype(np.uint8)
        expected = cv2.resize(pixels, (known["size"],) * 2, interpolation=cv2.INTER_AREA)
        image = np.frombuffer(found[name.removesuffix("json") + "png"], np.uint8)
        assert np.array_equal(cv2.imdecode(image, cv2.IMREAD_COLOR)[..., ::-1], expected), name
        count += 1
    return count


@pytest.mark.parametrize("mpp", [0.25, 0.5, 0.77, 1.0])
def test_exact_patches_are_openslide_s_pixels_averaged(tmp_path: Path, mpp: float) -> None:
    toy = toy_slide(tmp_path / AWKWARD_NAME, 1000, 800)
    request = replace(REQUEST, mpp=mpp, exact=True, overlap=8)
    (row,) = extract([toy.path], tmp_path / "out", request, save=("shards",), encoding=Encoding("png"))
    assert row["status"] == "ok" and row["patches"] > 5
    assert check_pixels(toy.path, members(tmp_path / "out/shards")) == row["patches"]


@real
@pytest.mark.parametrize("mpp", [0.5, None])
def test_a_real_slide_s_exact_patches_are_openslide_s_pixels(tmp_path: Path, mpp: float | None) -> None:
    request = Request(mpp=mpp, exact=True, upsample=True)
    path = DATA / "CMU-1-Small-Region.svs"
    out = Output(str(tmp_path), ("shards", "coords"), encoding=Encoding("png"))
    row = extract_slide(Entry("CMU-1", str(path)), request, out, threads=2)
    assert (row["status"], row["mpp_source"]) == ("ok", "openslide.mpp-x") and row["patches"] > 40
    assert row["mpp"] == pytest.approx(0.499 if mpp is None else 0.5, rel=0.002)
    assert check_pixels(path, members(tmp_path / "shards")) == row["patches"]


@real
def test_a_real_slide_passes_through(tmp_path: Path) -> None:
    """240-pixel tiles of a real Aperio file, whose RGB has no marker that says so."""
    path = DATA / "CMU-1-Small-Region.svs"
    request = Request(size=240, mpp=None, tissue="none", remove=(), coverage=0.9)
    extract_slide(Entry("CMU-1", str(path)), request, Output(str(tmp_path), ("shards",)))
    handle, found = openslide.open_slide(path), members(tmp_path / "shards")
    jpegs = {name: raw for name, raw in found.items() if name.endswith(".jpg")}
    assert len(jpegs) == 9 * 12
    for name, raw in jpegs.items():
        known = orjson.loads(found[name.removesuffix("jpg") + "json"])
        region = np.asarray(handle.read_region((known["x"], known["y"]), 0, (240, 240)))[..., :3]
        assert np.array_equal(cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_COLOR)[..., ::-1], region)


@pytest.mark.parametrize("name", ["plain", "TCGA-3C.DX1.F6E9", "Fall 7 – Übersicht 胃 (2)", "x" * 150 + " ü"])
def test_our_own_reader_takes_the_shards(tmp_path: Path, name: str) -> None:
    from medclip.data.sources import open_sources

    toy = toy_slide(tmp_path / "t.svs", 1000, 800)
    entry = Entry(name, str(toy.path), extra={"patient": "p 1", "label": "Krebs ü"})
    out = Output(str(tmp_path / "out"), ("shards", "coords"), per_shard=7)
    row = extract_slide(entry, REQUEST, out)
    (source,) = open_sources([{"urls": f"{tmp_path}/out/shards", "caption": False}], index=tmp_path / "index")
    assert len(source) == row["patches"] > 7 and source.problems == []
    index = {line["key"]: line for line in pq.read_table(tmp_path / f"out/index/{name}.parquet").to_pylist()}
    seen = set()
    for number in range(len(source)):
        sample = source.read(number, want_meta=True)
        known = sample.meta
        assert known is not None and (known["slide"], known["patient"], known["label"]) == (name, "p 1", "Krebs ü")
        line = index[known["key"]]
        assert (known["x"], known["y"], known["status"]) == (line["x"], line["y"], line["status"])
        image = cv2.imdecode(np.frombuffer(sample.image, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        x, y = known["x"], known["y"]
        expected = np.full((128, 128, 3), 255, np.uint8)
        part = toy.pixels[y : y + 128, x : x + 128]
        expected[: part.shape[0], : part.shape[1]] = part
        expected = cv2.resize(expected, (64, 64), interpolation=cv2.INTER_AREA)
        assert np.abs(image.astype(int) - expected).mean() < 6
        seen.add((x, y))
    assert len(seen) == row["patches"]
    keys = {name.split(".", 1)[0] for name in members(tmp_path / "out/shards")}  # as webdataset splits them
    assert keys == set(index)


def test_the_same_run_writes_the_same_bytes(tmp_path: Path) -> None:
    toy = toy_slide(tmp_path / "t.svs", 1000, 800)
    break_header(toy.path)
    extract([toy.path], tmp_path / "one")
    extract([toy.path], tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two") and leftovers(tmp_path) == []
    threads = Output(str(tmp_path / "three"), ("shards",), per_shard=7)
    extract_slide(entries_of([toy.path], patient="p 1")[0], REQUEST, threads, threads=3)
    shards = {n: c for n, c in contents(tmp_path / "one").items() if n.startswith("shards/")}
    assert shards == {n: c for n, c in contents(tmp_path / "three").items() if n.startswith("shards/")} and shards


def test_drawings_show_what_was_taken(tmp_path: Path) -> None:
    toy = toy_slide(tmp_path / "t.svs", 1000, 800, mpp=2.0)
    extract([toy.path], tmp_path / "out", replace(REQUEST, mpp=4.0))
    drawn = cv2.imread(str(tmp_path / "out/overlays/t.jpg"))
    assert max(drawn.shape) >= 1000 and drawn.std() > 10
    tissue = shapely.union_all(geometries(tmp_path / "out/masks/t.geojson", classes=["Tissue"]))
    truth = shapely.union_all(
        [shapely.affinity.scale(shapely.Point(x, y).buffer(1, 64), a, b) for x, y, a, b in toy.ellipses]
    )
    assert tissue.intersection(truth).area / tissue.union(truth).area > 0.85
    extract([toy.path], tmp_path / "plain", replace(REQUEST, mpp=4.0), drawings=False)
    assert not (tmp_path / "plain/overlays").exists() and not (tmp_path / "plain/masks").exists()


def test_corrupt_and_unscanned_patches_are_rows(tmp_path: Path) -> None:
    toy = toy_slide(tmp_path / "t.svs", 1000, 800, downsamples=(1,))
    break_header(toy.path, column=1, row=1)
    empty_tile(toy.path, column=0, row=1)
    (row,) = extract([toy.path], tmp_path / "out", replace(REQUEST, mpp=0.25))
    index = pq.read_table(tmp_path / "out/index/t.parquet").to_pylist()
    bad = [line for line in index if line["status"] == "corrupt"]
    assert row["status"] == "ok" and "tile" in row["reason"]
    assert row["corrupt"] == len(bad) == 16  # of 64 pixels in a tile of 256
    assert all(256 <= line["x"] < 512 and 256 <= line["y"] < 512 for line in bad)
    assert row["sparse"] == sum(line["status"] == "sparse" for line in index) > 0
    good = {line["key"] for line in index if line["status"] != "corrupt"}
    assert {name.rpartition(".")[0] for name in members(tmp_path / "out/shards")} == good
    assert len(list((tmp_path / "out/images/t").glob("*.jpg"))) == len(good)
    with h5py.File(tmp_path / "out/40x_64px_0px_overlap/patches/t_patches.h5") as f:
        assert int((f["status"][:] == 1).sum()) == 16 and len(f["coords"]) == len(index)  # type: ignore
        assert f["status"].attrs["values"] == "ok,corrupt,sparse"
    with h5py.File(tmp_path / "out/arrays/t.h5") as f:
        assert len(f["imgs"]) == len(f["coords"]) == len(good)  # type: ignore[arg-type]


def test_a_slide_without_tissue_is_empty_and_done(tmp_path: Path) -> None:
    path = tmp_path / "t.png"
    cv2.imwrite(str(path), np.full((500, 600, 3), 244, np.uint8))
    entry = Entry("t", str(path), mpp=0.5)
    out = Output(str(tmp_path / "out"), ("shards", "coords", "arrays"))
    row = extract_slide(entry, REQUEST, out)
    assert (row["status"], row["patches"], row["reason"]) == ("empty", 0, "no patch has 0.2 of tissue")
    with h5py.File(tmp_path / "out/20x_64px_0px_overlap/patches/t_patches.h5") as f:
        assert f["coords"].shape == (0, 2)  # type: ignore[union-attr]
    assert leftovers(tmp_path) == [] and extract_slide(entry, REQUEST, out) == row


def test_a_slide_smaller_than_a_patch_is_one_patch_on_white(tmp_path: Path) -> None:
    toy = toy_slide(tmp_path / "t.svs", 50, 40, downsamples=(1,), encoding=LOSSLESS)
    request = Request(size=64, mpp=0.25, tissue="none", remove=(), coverage=0.2, exact=True)
    (row,) = extract([toy.path], tmp_path / "out", request, save=("arrays",))
    assert (row["status"], row["patches"]) == ("ok", 1)
    with h5py.File(tmp_path / "out/arrays/t.h5") as f:
        (pixels,) = f["imgs"][:]  # type: ignore[index,misc]
    assert np.array_equal(pixels[:40, :50], toy.pixels)
    assert (pixels[40:] == 255).all() and (pixels[:, 50:] == 255).all()


def test_a_slide_of_corrupt_tiles_alone_failed_and_is_tried_again(tmp_path: Path) -> None:
    toy = toy_slide(tmp_path / "t.svs", 512, 256, downsamples=(1, 4))  # the overview is whole
    whole = toy.path.read_bytes()
    for column in (0, 1):
        break_header(toy.path, column=column, row=0)
    (row,) = extract([toy.path], tmp_path / "out", drawings=False)
    assert row["status"] == "failed" and row["reason"].startswith("every patch is corrupt, e.g. ")
    toy.path.write_bytes(whole)  # copied again
    (row,) = extract([toy.path], tmp_path / "out", drawings=False)
    assert (row["status"], row["corrupt"]) == ("ok", 0)
    extract([toy.path], tmp_path / "fresh", drawings=False)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_one_bad_slide_is_a_row_and_not_the_end(tmp_path: Path) -> None:
    good = toy_slide(tmp_path / "a.svs", 700, 600).path
    cut = truncate(toy_slide(tmp_path / "b.svs", 700, 600).path, 0.3)
    (tmp_path / "c.svs").write_text("no slide")
    rows = extract([cut, tmp_path / "c.svs", tmp_path / "gone.svs", good], tmp_path / "out")
    assert [row["status"] for row in rows] == ["failed"] * 3 + ["ok"]
    assert all(row["reason"] and "\n" not in row["reason"] for row in rows[:3])
    assert "gone.svs" in rows[2]["reason"] and leftovers(tmp_path / "out") == []


# ---- what breaks off goes on


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("unbroken")
    paths = [toy_slide(folder / f"s-{n}.svs", 800, 700, seed=n, downsamples=(1,)).path for n in range(2)]
    break_header(paths[1])
    rows = extract(paths, folder / "out")
    assert [row["status"] for row in rows] == ["ok", "ok"] and rows[1]["corrupt"] > 0
    assert all(row["patches"] > 14 for row in rows)  # three blocks and more
    return paths, contents(folder / "out")


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 8))])
def test_killed_at_random_it_writes_what_it_would_have_written(
    unbroken: tuple[list[Path], dict[str, Any]], tmp_path: Path, seed: int
) -> None:
    paths, expected = unbroken
    assert killed("extract", paths, tmp_path / "out", seed) >= 3
    assert contents(tmp_path / "out") == expected and leftovers(tmp_path / "out") == []


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_a_full_disk_ends_the_run_and_the_same_command_goes_on(
    unbroken: tuple[list[Path], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: int
) -> None:
    paths, expected = unbroken
    ended: list[int] = []
    original = ShardSaver.add

    def full(self: ShardSaver, *arguments: Any) -> None:
        if len(ended) == blocks:
            raise OutputError("cannot write x (No space left on device): make room")
        original(self, *arguments)

    def end(self: ShardSaver) -> tuple[str, int]:
        ended.append(1)
        return original_end(self)

    original_end = ShardSaver.end
    with monkeypatch.context() as patch:
        patch.setattr(ShardSaver, "add", full)
        patch.setattr(ShardSaver, "end", end)
        with pytest.raises(OutputError, match="No space left"):
            extract(paths, tmp_path / "out")
    assert len(list((tmp_path / "out/shards").glob("*.tar"))) == blocks
    assert not list((tmp_path / "out").rglob("*.part"))  # a full disk is not kept full
    written: list[str] = []
    monkeypatch.setattr(ShardSaver, "begin", lambda s, p, n: (written.append(f"{p.slide}-{n}"), begin(s, p, n))[1])
    extract(paths, tmp_path / "out")
    assert contents(tmp_path / "out") == expected and leftovers(tmp_path / "out") == []
    assert f"s-0-{blocks}" in written and not {f"s-0-{n}" for n in range(blocks)} & set(written)


begin = ShardSaver.begin


def test_every_write_may_find_the_disk_full(
    unbroken: tuple[list[Path], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever flush to disk fails, the run ends with an OutputError, or the failure was none of the run's."""
    paths, expected = unbroken
    original, number = os.fsync, 0
    for failing in range(0, 60, 5):
        number = 0

        def fsync(handle: int, failing: int = failing) -> None:
            nonlocal number
            number += 1
            if number > failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            original(handle)

        monkeypatch.setattr(os, "fsync", fsync)
        try:
            extract(paths, tmp_path / "out")
        except OutputError as error:
            assert "make room" in str(error) and "\n" not in str(error)
        monkeypatch.setattr(os, "fsync", original)
        assert not [p for p in (tmp_path / "out").rglob("*.part")]
    extract(paths, tmp_path / "out")
    assert contents(tmp_path / "out") == expected and leftovers(tmp_path / "out") == []


LIMITED = """
import resource, sys
from pathlib import Path
from tests.slides.runs import extract
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
try:
    extract([Path(sys.argv[3])], Path(sys.argv[2]), save=(sys.argv[4],))
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


@pytest.mark.parametrize("save", ["shards", "arrays", "coords"])
def test_a_file_that_cannot_grow_is_one_line(
    unbroken: tuple[list[Path], dict[str, Any]], tmp_path: Path, save: str
) -> None:
    """The system's own refusal in the middle of a write, through Python, HDF5 and Arrow."""
    path = unbroken[0][0]
    limit = {"shards": 9_000, "arrays": 130_000, "coords": 5_000}[save]
    command = [sys.executable, "-c", LIMITED, str(limit), str(tmp_path / "out"), str(path), save]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("OutputError: cannot write ") and done.stdout.count("\n") == 1, done.stderr
    assert "make room" in done.stdout and not list((tmp_path / "out").rglob("*.part"))
    extract([path], tmp_path / "out", save=(save,))
    extract([path], tmp_path / "fresh", save=(save,))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_what_another_run_holds_is_left_to_it(tmp_path: Path) -> None:
    paths = [toy_slide(tmp_path / f"{n}.svs", 600, 500).path for n in "ab"]
    with alone(tmp_path / "out/state/a.lock"):
        rows = extract(paths, tmp_path / "out")
        assert [row["status"] for row in rows] == ["busy", "ok"]
        assert rows[0]["reason"].startswith("a is being written by another run (process ")
        assert not list((tmp_path / "out").rglob("a-*.tar"))
    assert [row["status"] for row in extract(paths, tmp_path / "out")] == ["ok", "ok"]
    extract(paths, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_other_settings_are_refused_and_harm_nothing(tmp_path: Path) -> None:
    path = toy_slide(tmp_path / "a.svs", 600, 500).path
    extract([path], tmp_path / "out")
    before = contents(tmp_path / "out")
    for request, options in (
        (replace(REQUEST, size=32), {}),
        (REQUEST, {"per_shard": 8}),
        (REQUEST, {"save": ("coords",)}),
    ):
        with pytest.raises(SlideError, match=r"out holds the output of other settings: choose another folder"):
            extract([path], tmp_path / "out", request, **options)
    assert contents(tmp_path / "out") == before


def test_a_finished_slide_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = toy_slide(tmp_path / "a.svs", 600, 500).path
    rows = extract([path], tmp_path / "out")
    monkeypatch.setattr(extraction, "open_slide", None)
    assert extract([path], tmp_path / "out") == rows


def test_a_shard_that_was_lost_meanwhile_is_written_again(
    unbroken: tuple[list[Path], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, expected = unbroken

    def stop(*_: Any) -> None:
        raise OutputError("stop")

    with monkeypatch.context() as patch:
        patch.setattr(extraction, "write_index", stop)  # all blocks are there, the slide is not done
        with pytest.raises(OutputError):
            extract(paths, tmp_path / "out")
    (tmp_path / "out/shards/s-0-00001.tar").unlink()
    (tmp_path / "out/shards/s-0-00000.tar").write_bytes(b"half")
    extract(paths, tmp_path / "out")
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("wrong", [{"save": ()}, {"save": ("shard",)}, {"layout": "qupath"}, {"per_shard": 0}])
def test_an_output_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SlideError, match=r"choose|is 0"):
        Output("out", **wrong)
