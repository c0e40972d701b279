"""Shards written from any source: the same bytes however it went, and read back as they were."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from medclip.data.make_shards import image_extension, make_shards, member_key
from medclip.data.raw import Source
from medclip.data.sources import open_sources
from medclip.data.tar import split_name
from medclip.types import UserError
from tests.conftest import jpeg, write_tar


def encoded(kind: str, rng: np.random.Generator) -> bytes:
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(out, kind)
    return out.getvalue()


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 rows of images of every kind, of which four are no pairs."""
    folder = tmp_path_factory.mktemp("table")
    rng = np.random.default_rng(0)
    kinds = ("jpeg", "png", "webp", "tiff", "gif", "bmp")
    rows = []
    for i in range(60):
        data = jpeg(rng) if i % 2 else encoded(kinds[i // 2 % 6], rng)
        (folder / f"{i}.img").write_bytes(data if i != 13 else data[: len(data) // 3])
        row = {"image": f"{i}.img", "caption": f"Bild № {i}.", "key": f"set.a/{i}-fig.{i}", "n": i, "deep": {"x": [i]}}
        rows.append(row)
    rows[20]["image"] = "none.img"
    rows[30]["caption"] = "No caption found."
    del rows[40]["caption"]
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "t.jsonl"


def opened(table: Path, **config: Any) -> Source:
    return open_sources([{"table": str(table)} | config], index=table.parent / "index")[0]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def whole(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "shards"
    done = make_shards(opened(table), folder, samples_per_shard=7)
    assert (done.shards, done.samples, done.skipped) == (9, 56, 4)
    return folder


def test_read_back_equal(table: Path, whole: Path) -> None:
    before = opened(table)
    after = open_sources([{"urls": str(whole)}], index=whole.parent / "index")[0]
    good = [i for i in range(len(before)) if before.key(i).rpartition(".")[2] not in ("13", "20", "30")]
    assert len(after) == len(good) == 56
    for j, i in enumerate(good):
        old, new = before.read(i), after.read(j, want_meta=True)
        assert (new.key, new.image, new.text, new.meta) == (old.key, old.image, old.text, old.meta)
    chosen = open_sources([{"urls": str(whole), "filter": "n < 5 and deep.x[0] > 2"}], index=whole.parent / "index")[0]
    assert [chosen.key(i) for i in range(len(chosen))] == ["set.a/3-fig.3", "set.a/4-fig.4"]


def test_other_programs_read_them(whole: Path) -> None:
    names = []
    for path in sorted(whole.glob("*.tar")):
        with tarfile.open(path) as tar:
            names += [(info.name, info.size, info.uid, info.mtime) for info in tar]
    assert names[:3] == [(f"set.a/0-fig.0.{e}", names[k][1], 0, 0) for k, e in enumerate(("jpg", "txt", "json"))]
    assert len(names) == 3 * 56
    sizes = json.loads((whole / "sizes.json").read_text())  # open_clip's
    assert sum(sizes.values()) == 56 and list(sizes) == sorted(path.name for path in whole.glob("*.tar"))


def test_what_was_left_out_is_listed(whole: Path) -> None:
    listed = {
        row["key"]: row["reason"] for row in map(orjson.loads, (whole / "skipped.jsonl").read_bytes().splitlines())
    }
    assert listed == {
        "set.a/13-fig.13": "broken image",
        "set.a/20-fig.20": "missing image",
        "set.a/30-fig.30": "empty caption",
        "set.a/40-fig.40": "missing caption",
    }


def test_same_bytes_with_two_processes(table: Path, whole: Path, tmp_path: Path) -> None:
    make_shards(opened(table), tmp_path / "s", samples_per_shard=7, processes=2)
    assert digests(tmp_path / "s") == digests(whole)


def test_same_bytes_after_kills(table: Path, whole: Path, tmp_path: Path) -> None:
    """Killed in the middle again and again; each time it goes on where it was."""
    slow = (
        "import sys, time; import medclip.data.make_shards as m; from medclip.data.sources import open_sources\n"
        "add = m._add\n"
        "def slowly(*a):\n"
        "    time.sleep(0.03)\n"
        "    add(*a)\n"
        "m._add = slowly\n"
        "m.make_shards(open_sources([{'table': sys.argv[1]}])[0], sys.argv[2], samples_per_shard=7)\n"
    )
    out, grown = tmp_path / "s", []
    for wanted in (1, 4):
        process = subprocess.Popen([sys.executable, "-c", slow, str(table), str(out)])
        until = time.monotonic() + 60
        while len(list(out.glob("*.tar"))) < wanted or not list(out.glob("*.part")):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        grown.append({path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")})
    assert grown[0].items() <= grown[1].items()  # what was whole was not written again
    with (out / "shards.jsonl").open("ab") as file:
        file.write(b'{"set": "half a li')
    make_shards(opened(table), out, samples_per_shard=7)
    assert digests(out) == digests(whole)


def test_damaged_shard_is_written_again_and_a_finished_set_is_left(table: Path, whole: Path, tmp_path: Path) -> None:
    make_shards(opened(table), tmp_path / "s", samples_per_shard=7)
    (tmp_path / "s" / "00003.tar").write_bytes(b"cut")
    (tmp_path / "s" / "00004.tar").unlink()
    before = (tmp_path / "s" / "00000.tar").stat().st_mtime_ns
    make_shards(opened(table), tmp_path / "s", samples_per_shard=7)
    assert digests(tmp_path / "s") == digests(whole)
    assert (tmp_path / "s" / "00000.tar").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("00000.tar", "mine"),
        ("x.tar", "mine"),
        ("sizes.json", "{}"),
        ("skipped.jsonl", ""),
        ("shards.jsonl", '{"set": "other", "shard": "00000.tar"}'),
        ("shards.jsonl", '{"shard": "00000.tar"}'),
        ("shards.jsonl", "17"),
    ],
)
def test_folder_of_something_else_is_refused_and_left_alone(
    table: Path, tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content)
    before = digests(tmp_path)
    with pytest.raises(UserError, match="choose another folder"):
        make_shards(opened(table), tmp_path, samples_per_shard=7)
    assert digests(tmp_path) == before


def test_other_options_are_another_set(table: Path, whole: Path, tmp_path: Path) -> None:
    before = digests(whole)
    for source, options in (
        (opened(table), {"samples_per_shard": 8}),
        (opened(table, caption="n"), {"samples_per_shard": 7}),
        (opened(table, filter="n > 3"), {"samples_per_shard": 7}),
        (opened(table), {"samples_per_shard": 7, "max_pixels": 10}),
    ):
        with pytest.raises(UserError, match="another set"):
            make_shards(source, whole, **options)
    assert digests(whole) == before


def test_nothing_usable_and_no_room(table: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no sample of .* is usable, e\.g\. .*'missing caption'"):
        make_shards(opened(table, filter="n == 1"), tmp_path / "s", max_pixels=10)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write shards"):
        make_shards(opened(table), tmp_path / "file" / "s")
    with pytest.raises(UserError, match="at least 1"):
        make_shards(opened(table), tmp_path / "t", samples_per_shard=0)


def test_from_shards_with_class_numbers(tmp_path: Path) -> None:
    image = jpeg(np.random.default_rng(0))
    write_tar(tmp_path / "0.tar", [{"key": b"a", "jpg": image, "cls": b"1"}, {"key": b"a", "jpg": image, "cls": b"0"}])
    (tmp_path / "classnames.txt").write_text("x\ny")
    before = open_sources([{"urls": str(tmp_path / "0.tar"), "caption": False}], index=tmp_path / "index")[0]
    make_shards(before, tmp_path / "s")
    after = open_sources([{"urls": str(tmp_path / "s"), "caption": False}], index=tmp_path / "index")[0]
    assert [(after.key(i), after.fields(i)["label"]) for i in range(2)] == [
        ("a", "y"),
        ("a", "x"),
    ]  # a key that comes twice


def test_metadata_that_json_forbids(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(np.random.default_rng(0)))
    big = 12345678901234567890123
    (tmp_path / "t.jsonl").write_text(f'{{"image": "a.jpg", "caption": "x\\ud800", "nan": NaN, "big": {big}}}\n')
    make_shards(opened(tmp_path / "t.jsonl"), tmp_path / "s")
    raw = open_sources([{"urls": str(tmp_path / "s")}], index=tmp_path / "index")[0].read(0, want_meta=True)
    assert raw.text == "x?" and raw.meta is not None and int(raw.meta["big"]) == big


names = st.text(st.characters(codec="utf-8"), max_size=60) | st.text(st.sampled_from("./\\a_s.ynpaug"), max_size=12)


@given(names)
def test_any_key_becomes_one_that_readers_take_and_that_stays_inside(key: str) -> None:
    name = member_key(key)
    for extension in ("jpg", "txt", "json"):
        assert split_name(f"{name}.{extension}") == (name, extension)
    inside = os.path.normpath(f"/root/{name}.jpg")
    assert inside == f"/root/{name}.jpg"
    assert member_key(name) == name


@pytest.mark.parametrize(
    ("kind", "ending"),
    [("jpeg", "jpg"), ("png", "png"), ("webp", "webp"), ("gif", "gif"), ("tiff", "tif"), ("bmp", "bmp")],
)
def test_endings_by_content(kind: str, ending: str) -> None:
    assert image_extension(encoded(kind, np.random.default_rng(0))) == ending
