"""Where patches go, block by block: a block that fails leaves nothing, corrupt patches have no file and no row."""

from __future__ import annotations

import errno
import os
import tarfile
from pathlib import Path

import h5py
import numpy as np
import orjson
import pytest

from slides.entry import Entry
from slides.files import OutputError
from slides.open import open_slide
from slides.patches import CORRUPT, OK, SPARSE, Chunk
from slides.plan import Plan, make_plan
from slides.request import Request
from slides.save import ArraySaver, FileSaver, Saver, ShardSaver, metadata
from slides.stream import Made
from tests.slides.toys import toy_slide

STATUS = np.array([OK, CORRUPT, SPARSE, OK], np.uint8)
FILES = [b"first", b"", b"third", b"fourth"]
PIXELS = np.arange(4 * 32 * 32 * 3, dtype=np.uint64).astype(np.uint8).reshape(4, 32, 32, 3)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    toy = toy_slide(tmp_path_factory.mktemp("save") / "t.svs", 600, 500)
    with open_slide(toy.path) as slide:
        return make_plan(slide, "s.1", Request(size=32, mpp=0.5, tissue="none", remove=()))[0]


ENTRY = Entry("s.1", "/data/s.1.svs", extra={"patient": "p 7", "label": "ü", "x": "mine", "status": "mine"})


def saver_of(kind: str, folder: Path) -> Saver:
    if kind == "shards":
        return ShardSaver(folder / "shards", "jpg")
    return FileSaver(folder / "images", "jpg") if kind == "images" else ArraySaver(folder / "arrays", folder / "state")


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def fill(saver: Saver, plan: Plan, number: int = 0) -> None:
    saver.begin(plan, number)
    saver.add(ENTRY, plan, np.arange(4) + 4 * number, Chunk(0, STATUS, Made(FILES, PIXELS), ()))


def test_a_shard_has_two_members_a_patch(plan: Plan, tmp_path: Path) -> None:
    saver = saver_of("shards", tmp_path)
    fill(saver, plan)
    assert not (tmp_path / "shards/s.1-00000.tar").exists()  # whole or not at all
    name, size = saver.end()
    assert (name, size) == ("s.1-00000.tar", (tmp_path / "shards" / name).stat().st_size)
    with tarfile.open(tmp_path / "shards" / name) as tar:
        content = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    keys = [f"s-1_{x}_{y}" for x, y in plan.coords[[0, 2, 3]].tolist()]
    assert list(content) == [f"{key}.{ending}" for key in keys for ending in ("jpg", "json")]
    assert [content[f"{key}.jpg"] for key in keys] == [b"first", b"third", b"fourth"]
    assert [orjson.loads(content[f"{key}.json"])["status"] for key in keys] == ["ok", "sparse", "ok"]


def test_metadata_say_where_a_patch_is_and_what_the_table_says(plan: Plan) -> None:
    known = orjson.loads(metadata(ENTRY, plan, 5, SPARSE))
    x, y = plan.coords[5].tolist()
    assert known == {
        "patient": "p 7", "label": "ü", "key": f"s-1_{x}_{y}", "slide": "s.1", "x": x, "y": y, "mpp": 0.5, "level": 0,
        "read_size": 64, "size": 32, "coverage": known["coverage"], "status": "sparse",
    }  # fmt: skip
    assert known["coverage"] == pytest.approx(float(plan.coverage[5]), abs=1e-4)


def test_images_are_named_by_place(plan: Plan, tmp_path: Path) -> None:
    saver = saver_of("images", tmp_path)
    fill(saver, plan)
    assert saver.end() == ("", len(b"firstthirdfourth"))
    places = plan.coords[[0, 2, 3]].tolist()
    assert files(tmp_path) == sorted(f"images/s.1/{x}_{y}.jpg" for x, y in places)
    assert (tmp_path / "images/s.1" / "{}_{}.jpg".format(*places[2])).read_bytes() == b"fourth"


def test_arrays_are_clam_s_images(plan: Plan, tmp_path: Path) -> None:
    saver = ArraySaver(tmp_path / "arrays", tmp_path / "state")
    for number in (0, 1):
        fill(saver, plan, number)
        assert saver.end() == ("", 3 * 32 * 32 * 3)
    saver.begin(plan, 2)
    saver.add(ENTRY, plan, np.arange(8, 9), Chunk(0, np.array([CORRUPT], np.uint8), Made(None, PIXELS[:1]), ()))
    saver.end()
    status = np.full(len(plan), CORRUPT, np.uint8)
    status[:8] = np.tile(STATUS, 2)
    saver.finish(plan, status, "clam")
    with h5py.File(tmp_path / "arrays/s.1.h5") as f:
        assert np.array_equal(f["imgs"][:], np.tile(PIXELS[[0, 2, 3]], (2, 1, 1, 1)))  # type: ignore[index]
        assert np.array_equal(f["coords"][:], plan.coords[[0, 2, 3, 4, 6, 7]])  # type: ignore[index]
        assert f["imgs"].attrs["wsi_name"] == "s.1" and f["imgs"].attrs["patch_level"] == 0
        assert f["imgs"].maxshape == (None, 32, 32, 3)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["shards", "arrays"])
def test_a_block_that_is_dropped_leaves_nothing(kind: str, plan: Plan, tmp_path: Path) -> None:
    saver = saver_of(kind, tmp_path)
    saver.drop()  # before it began
    fill(saver, plan)
    assert len(files(tmp_path)) == 1
    saver.drop()
    assert files(tmp_path) == []
    fill(saver, plan)
    saver.end()
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("kind", ["shards", "arrays"])
def test_a_full_disk_is_an_output_error(kind: str, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = saver_of(kind, tmp_path)
    fill(saver, plan)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="make room"):
        saver.end()
    saver.drop()
    assert files(tmp_path) == []
