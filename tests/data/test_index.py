"""Indexes kept on disk: used again, made anew for a changed shard, and never needed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from medclip.data import index as indexes
from medclip.data.index import index_shards, load_arrays, save_arrays
from medclip.data.storage import Storage
from medclip.data.tar import TarIndex
from medclip.types import UserError
from tests.conftest import write_tar
from tests.data.conftest import Server


def shard(path: Path, count: int = 3) -> str:
    write_tar(path, [{"key": f"k.{i}".encode(), "jpg": b"j" * i, "txt": b"t"} for i in range(count)])
    return str(path)


def same(a: TarIndex, b: TarIndex) -> bool:
    about = [(x.url, x.size, x.tag, [x.keys[i] for i in range(len(x))], x.truncated, x.lost) for x in (a, b)]
    return about[0] == about[1] and all(
        np.array_equal(getattr(a, name)[e], getattr(b, name)[e]) for name in ("offsets", "sizes") for e in a.offsets
    )


def test_second_run_loads_what_the_first_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = shard(tmp_path / "a.tar")
    first = index_shards(Storage(), [url], tmp_path / "index")[0]

    def never(*_: object, **__: object) -> None:
        raise AssertionError("indexed again")

    monkeypatch.setattr(indexes, "index_tar", never)
    assert same(first, index_shards(Storage(), [url], tmp_path / "index")[0])
    # The same file by a relative path is the same file.
    monkeypatch.chdir(tmp_path)
    assert len(index_shards(Storage(), ["a.tar"], tmp_path / "index")[0]) == 3


def test_what_a_cut_shard_lost_is_remembered(tmp_path: Path) -> None:
    path = Path(shard(tmp_path / "a.tar"))
    path.write_bytes(path.read_bytes()[: 512 * 8 + 1])  # within k.2.jpg
    first, second = (index_shards(Storage(), [str(path)], tmp_path / "index")[0] for _ in range(2))
    assert first.truncated and first.lost == ("k.2",)
    assert same(first, second)


def test_changed_shard_is_indexed_anew(tmp_path: Path) -> None:
    url = shard(tmp_path / "a.tar", 3)
    index_shards(Storage(), [url], tmp_path / "index")
    before = Path(url).stat()
    shard(tmp_path / "a.tar", 4)
    os.utime(url, ns=(before.st_atime_ns, before.st_mtime_ns + 1))  # as little as may change
    assert len(index_shards(Storage(), [url], tmp_path / "index")[0]) == 4


def test_changed_remote_shard_is_indexed_anew(tmp_path: Path, server: Server, remote: Storage) -> None:
    def put(first: bytes) -> None:
        write_tar(tmp_path / "a.tar", [{"key": first, "jpg": b"1"}])
        server.files["/a.tar"] = (tmp_path / "a.tar").read_bytes()

    put(b"old")
    url = f"{server.url}/a.tar"
    assert index_shards(remote, [url], tmp_path / "index")[0].keys[0] == "old"
    put(b"new")
    server.tag = '"two"'
    assert index_shards(Storage(backoff=0.001), [url], tmp_path / "index")[0].keys[0] == "new"


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_folder_without_permission_is_only_slower(tmp_path: Path) -> None:
    (tmp_path / "index").mkdir(mode=0o500)
    assert len(index_shards(Storage(), [shard(tmp_path / "a.tar")], tmp_path / "index")[0]) == 3


def test_folder_that_is_a_file_is_only_slower(tmp_path: Path) -> None:
    (tmp_path / "index").write_text("in the way")
    assert len(index_shards(Storage(), [shard(tmp_path / "a.tar")], tmp_path / "index")[0]) == 3
    assert (tmp_path / "index").read_text() == "in the way"


def test_damaged_index_is_made_anew(tmp_path: Path) -> None:
    url = shard(tmp_path / "a.tar")
    first = index_shards(Storage(), [url], tmp_path / "index")[0]
    (kept,) = (tmp_path / "index").iterdir()
    whole = kept.read_bytes()
    for damage in (whole[:-40], whole[: len(whole) // 2], b"", b"\0" * 100, b"PK\3\4" + b"\0" * 50):
        kept.write_bytes(damage)
        assert same(first, index_shards(Storage(), [url], tmp_path / "index")[0])
    assert load_arrays(kept) is not None


def test_arrays_come_back_and_leave_no_parts(tmp_path: Path) -> None:
    save_arrays(tmp_path / "x" / "a.npz", numbers=np.arange(5))
    found = load_arrays(tmp_path / "x" / "a.npz")
    assert found is not None and found["numbers"].tolist() == [0, 1, 2, 3, 4]
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["a.npz"]


def test_order_of_many_and_errors_name_the_shard(tmp_path: Path) -> None:
    urls = [shard(tmp_path / f"{i}.tar", i + 1) for i in range(20)]
    assert [len(x) for x in index_shards(Storage(), urls, tmp_path / "index")] == list(range(1, 21))
    (tmp_path / "7.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match=r"7\.tar is not a tar"):
        index_shards(Storage(), urls, tmp_path / "index")
    with pytest.raises(UserError, match="cannot open"):
        index_shards(Storage(), [str(tmp_path / "none.tar")], tmp_path / "index")


def test_indexing_leaves_no_file_open(tmp_path: Path) -> None:
    urls = [shard(tmp_path / f"{i}.tar") for i in range(60)]
    before = len(list(Path("/proc/self/fd").iterdir()))
    storage = Storage()
    index_shards(storage, urls, tmp_path / "index")
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2
