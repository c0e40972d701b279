"""Names to URLs, and exact bytes from any of them: local, fsspec, and a web server on a bad day."""

from __future__ import annotations

import multiprocessing
import pickle
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medclip.data.bad import BadSample
from medclip.data.cache import BlockCache
from medclip.data.http import _retry_after, public
from medclip.data.retry import GiveUp, TryAgain, retry
from medclip.data.sources import open_storage
from medclip.data.storage import Storage, _over_http, expand
from medclip.types import UserError
from tests.data.conftest import Server, now_and_then

BODY = np.random.default_rng(0).bytes(50_000)


def plain(**options: object) -> Storage:
    """No cache: every read is a request."""
    return Storage(None, **{"tries": 12, "backoff": 0.001, "timeout": 5} | options)  # pyright: ignore


# Names


def test_expand_braces_globs_folders_lists_and_joins(tmp_path: Path) -> None:
    names = ["00000.tar", "00001.tar", "00002.tar", "x[1].tar"]
    for name in [*names, "notes.txt"]:
        (tmp_path / name).write_bytes(b"")
    every = [str(tmp_path / name) for name in names]
    assert expand(f"{tmp_path}/{{00000..00002}}.tar") == every[:3]
    assert expand(f"{tmp_path}/*.tar") == every
    assert expand(str(tmp_path)) == every
    assert expand(every[3]) == every[3:]  # as it is written, before its brackets mean anything
    assert expand(f"{every[2]}::{tmp_path}/0000[01].tar") == [every[2], *every[:2]]
    assert expand([every[1], f"{tmp_path}/{{00000,00002}}.tar"]) == [every[1], every[0], every[2]]
    assert expand(f"file://{every[0]}") == [every[0]]
    assert expand("https://h/{0..2}.tar?a=1") == [f"https://h/{i}.tar?a=1" for i in range(3)]
    assert expand("s3://b/{a,b}.tar::gs://c/d.tar") == ["s3://b/a.tar", "s3://b/b.tar", "gs://c/d.tar"]


@pytest.mark.parametrize(
    ("urls", "says"),
    [
        ("/nowhere/*.tar", "no shard matches"),
        ("/nowhere/{0..3}.tar", r"no shard matches /nowhere/0\.tar"),
        ("/nowhere/{0..3.tar", "bad brace range"),
        ([], "empty"),
        ("pipe:aws s3 cp s3://b/x.tar -", "pipe"),
        ("https://h/*.tar", "no listing"),
        ("nosuchscheme://b/*.tar", "cannot list"),
    ],
)
def test_bad_names_get_one_line(urls: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        expand(urls)
    assert "\n" not in str(caught.value)


def test_public_names_hold_no_secret() -> None:
    assert public("https://me:word@host:8/a/b.tar?X-Amz-Signature=abc#f") == "https://host:8/a/b.tar"
    assert public("/local/a?b.tar") == "/local/a?b.tar"


def test_hub_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert _over_http("hf://datasets/o/n/a/b.tar") == "https://huggingface.co/datasets/o/n/resolve/main/a/b.tar"
    assert _over_http("hf://datasets/o/n@v1/b c#.tar") == "https://huggingface.co/datasets/o/n/resolve/v1/b%20c%23.tar"
    assert _over_http("hf://o/n/b.tar") == "https://huggingface.co/o/n/resolve/main/b.tar"
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror/")
    assert _over_http("hf://o/n/b.tar") == "http://mirror/o/n/resolve/main/b.tar"
    with pytest.raises(UserError, match="hf://datasets/OWNER/NAME"):
        Storage().stat("hf://datasets/o")


# Local files


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 900), st.integers(0, 99))
def test_local_reads(tmp_path_factory: pytest.TempPathFactory, offset: int, length: int) -> None:
    path = tmp_path_factory.getbasetemp() / "thousand"
    if not path.exists():
        path.write_bytes(BODY[:1000])
    assert Storage().read(str(path), offset, length) == BODY[offset : offset + length]
    assert Storage().read(f"file://{path}", offset, length) == BODY[offset : offset + length]


def test_local_file_that_shrank_or_went(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(BODY[:100])
    storage = Storage()
    with pytest.raises(BadSample, match="ends early"):
        storage.read(str(tmp_path / "a"), 50, 100)
    with pytest.raises(BadSample, match="No such file"):
        storage.read(str(tmp_path / "b"), 0, 1)
    with pytest.raises(UserError, match="No such file"):
        storage.stat(str(tmp_path / "b"))


def test_more_files_than_stay_open(tmp_path: Path) -> None:
    for i in range(80):
        (tmp_path / str(i)).write_bytes(b"%03d" % i)
    storage = Storage()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for i in [*range(80), *range(80)]:
        assert storage.read(str(tmp_path / str(i)), 0, 3) == b"%03d" % i
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 33
    del storage
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1


# fsspec


def test_memory_through_fsspec(remote: Storage) -> None:
    with fsspec.open("memory://t/a.bin", "wb") as file:
        file.write(BODY)  # pyright: ignore
    assert remote.stat("memory://t/a.bin").size == len(BODY)
    for offset, length in ((0, 10), (4000, 5000), (49_990, 10), (0, len(BODY))):
        assert remote.read("memory://t/a.bin", offset, length) == BODY[offset : offset + length]
    assert expand("memory://t/*.bin") == ["memory:///t/a.bin"] or expand("memory://t/*.bin") == ["memory://t/a.bin"]
    with pytest.raises(UserError, match="cannot open memory://t/none"):
        remote.stat("memory://t/none")


def test_unknown_protocol_is_one_line() -> None:
    with pytest.raises(UserError, match="cannot open") as caught:
        plain().stat("nosuch://key:word@b/x.tar")
    assert "word" not in str(caught.value)


# http


def read_some(storage: Storage, url: str, count: int = 40) -> None:
    rng = np.random.default_rng(1)
    for _ in range(count):
        offset = int(rng.integers(0, len(BODY)))
        length = int(rng.integers(0, min(6000, len(BODY) - offset) + 1))
        assert storage.read(url, offset, length) == BODY[offset : offset + length]


@pytest.mark.parametrize("cached", [False, True])
def test_exact_bytes_from_a_server_that_fails_now_and_then(server: Server, remote: Storage, cached: bool) -> None:
    server.files["/a.bin"] = BODY
    server.fail = now_and_then(0.5, seed=3)
    read_some(remote if cached else plain(tries=40), f"{server.url}/a.bin")
    failures = {kind for kind in server.answered if kind is not None}
    assert len(failures) >= 3, failures  # it did fail


@pytest.mark.parametrize("kind", [429, 503, 500, 408, "reset", "short", "whole", "shifted"])
def test_each_failure_is_tried_again(server: Server, kind: object) -> None:
    server.files["/a.bin"] = BODY
    server.fail = lambda number, path: kind if number < 2 else None
    assert plain().read(f"{server.url}/a.bin", 100, 200) == BODY[100:300]
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("kind", "says", "requests"),
    [(404, "HTTP 404", 1), (403, "HTTP 403", 1), (503, "HTTP 503.*tried 3 times", 3), ("whole", "ignores range", 3)],
)
def test_what_lasts_is_given_up(server: Server, kind: object, says: str, requests: int) -> None:
    server.files["/a.bin"] = BODY
    server.fail = lambda number, path: kind
    with pytest.raises(BadSample, match=says) as caught:
        plain(tries=3).read(f"{server.url}/a.bin?token=secret", 0, 10)
    assert len(server.requests) == requests
    assert caught.value.reason == "read error" and "secret" not in str(caught.value)
    with pytest.raises(UserError, match=says) as stat:
        plain(tries=3).stat(f"{server.url}/a.bin?token=secret")
    assert "secret" not in str(stat.value)


def test_silence_is_a_failure(server: Server) -> None:
    server.files["/a.bin"] = BODY
    server.fail = lambda number, path: "slow" if number == 0 else None
    assert plain(timeout=0.3).read(f"{server.url}/a.bin", 0, 10) == BODY[:10]
    assert len(server.requests) == 2


def test_server_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"connection failed.*tried 2 times"):
        plain(tries=2).stat("http://127.0.0.1:9/a.bin")


def test_retry_after_is_obeyed(server: Server) -> None:
    server.files["/a.bin"] = BODY
    server.retry_after = "0.5"
    server.fail = lambda number, path: 429 if number == 0 else None
    start = time.monotonic()
    assert plain().read(f"{server.url}/a.bin", 0, 10) == BODY[:10]
    assert time.monotonic() - start >= 0.5


def test_retry_after_of_every_form() -> None:
    assert _retry_after("3") == 3
    later = _retry_after(format_datetime(datetime.now(UTC) + timedelta(seconds=20), usegmt=True))
    assert later is not None and 17 < later <= 20
    assert _retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert _retry_after("-5") == 0
    assert [_retry_after(value) for value in (None, "", "soon", "nan", "inf")] == [None] * 5


def test_retry_waits_longer_each_time_and_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)

    def attempt() -> None:
        raise TryAgain("busy", 1e9 if len(waits) == 3 else None)

    with pytest.raises(GiveUp, match=r"busy \(tried 6 times"):
        retry(attempt, tries=6, backoff=1.0)
    assert len(waits) == 5 and waits[3] == 120.0  # a server may ask for more than anyone has
    assert all(0 <= wait <= 2 ** (k + 1) for k, wait in enumerate(waits) if k != 3)


def test_redirect_to_a_signed_url_is_kept_and_renewed(server: Server, other_server: Server) -> None:
    server.redirect_to = other_server.url
    server.fail = lambda number, path: "redirect"
    other_server.files["/a.bin"] = BODY
    storage = plain()
    read_some(storage, f"{server.url}/a.bin", 10)
    assert len(server.requests) == 1  # the rest went straight to the target
    other_server.fail = lambda number, path: 403 if number == straight else None  # the signature has run out
    straight = len(other_server.requests)
    assert storage.read(f"{server.url}/a.bin", 5, 5) == BODY[5:10]
    assert len(server.requests) == 2


def test_token_goes_to_the_hub_and_nowhere_else(
    server: Server, other_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.fail = lambda number, path: "redirect"
    server.redirect_to = other_server.url
    other_server.files["/datasets/o/n/resolve/main/a.bin"] = BODY
    other_server.files["/b.bin"] = BODY
    storage = plain()
    assert storage.read("hf://datasets/o/n/a.bin", 3, 4) == BODY[3:7]
    assert storage.read("hf://datasets/o/n/a.bin", 4, 4) == BODY[4:8]
    assert storage.read(f"{other_server.url}/b.bin", 3, 4) == BODY[3:7]
    assert [headers.get("Authorization") for _, headers in server.requests] == ["Bearer hf_secret"]
    assert all("Authorization" not in headers for _, headers in other_server.requests)
    assert len(other_server.requests) == 3


def test_gated_repository_without_a_token(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    server.fail = lambda number, path: 401
    with pytest.raises(UserError, match="set HF_TOKEN"):
        plain().stat("hf://datasets/o/n/a.bin")


def test_empty_remote_file(server: Server, remote: Storage) -> None:
    server.files["/a.bin"] = b""
    assert remote.stat(f"{server.url}/a.bin").size == 0
    assert remote.read_all(f"{server.url}/a.bin") == b""


# The disk cache


def test_each_block_is_fetched_once(server: Server, remote: Storage) -> None:
    server.files["/a.bin"] = BODY
    read_some(remote, f"{server.url}/a.bin", 60)
    blocks = -(-len(BODY) // 4096)
    assert len(server.requests) <= 1 + blocks  # one for the size
    seen = len(server.requests)
    read_some(remote, f"{server.url}/a.bin", 60)
    assert len(server.requests) == seen


def test_prefetched_bytes_need_no_request_and_failures_are_left_to_the_reader(server: Server, remote: Storage) -> None:
    server.files["/a.bin"] = BODY
    url = f"{server.url}/a.bin"
    remote.stat(url)
    server.fail = lambda number, path: 503
    start = len(server.requests)
    remote.prefetch(url, 0, 5000)
    assert len(server.requests) == start + 1  # one attempt: nobody waits for it
    server.fail = lambda number, path: None
    remote.prefetch(url, 0, 5000)
    seen = len(server.requests)
    assert remote.read(url, 10, 4990) == BODY[10:5000]
    assert len(server.requests) == seen


def sizes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("[0-9a-f][0-9a-f]/*"))


def test_cache_stays_below_its_cap_and_drops_the_oldest(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "c", max_gb=40_000 / 1e9, block=1000)
    fetched: list[tuple[int, int]] = []

    def fetch(url: str, offset: int, length: int) -> bytes:
        fetched.append((offset, length))
        return BODY[offset : offset + length]

    for start in range(0, 50_000, 1000):
        assert cache.read("u", "t", 50_000, start, 1000, fetch) == BODY[start : start + 1000]
        cache.read("u", "t", 50_000, 0, 10, fetch)  # always in use
        time.sleep(0.001)
        assert sizes(cache.folder) <= 40_000
    assert sizes(cache.folder) > 30_000
    assert fetched.count((0, 1000)) == 1  # what is in use stays
    assert len(fetched) == 50


def test_block_larger_than_the_cap_is_passed_through(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "c", max_gb=500 / 1e9, block=1000)
    assert cache.read("u", "t", 2000, 100, 1500, lambda u, o, n: BODY[o : o + n]) == BODY[100:1600]
    assert sizes(cache.folder) <= 500


@pytest.mark.parametrize("damage", [b"", b"short", BODY[:5000]])
def test_block_of_the_wrong_length_is_fetched_again(tmp_path: Path, damage: bytes) -> None:
    cache = BlockCache(tmp_path / "c", 1, 1000)
    calls: list[int] = []

    def fetch(url: str, offset: int, length: int) -> bytes:
        calls.append(offset)
        return BODY[offset : offset + length]

    assert cache.read("u", "t", 2500, 0, 2500, fetch) == BODY[:2500]
    for path in cache.folder.glob("[0-9a-f][0-9a-f]/*"):
        path.write_bytes(damage)
    assert cache.read("u", "t", 2500, 0, 2500, fetch) == BODY[:2500]
    assert sorted(calls) == [0, 0, 1000, 1000, 2000, 2000]


def test_new_tag_is_new_content(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "c", 1, 1000)
    assert cache.read("u", "one", 10, 0, 10, lambda u, o, n: b"a" * n) == b"a" * 10
    assert cache.read("u", "two", 10, 0, 10, lambda u, o, n: b"b" * n) == b"b" * 10


def test_lost_folder_or_counter_costs_only_the_caching(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "c", 1, 1000)

    def fetch(url: str, offset: int, length: int) -> bytes:
        return BODY[offset : offset + length]

    cache.read("u", "t", 3000, 0, 1000, fetch)
    (cache.folder / "locks" / "bytes").write_text("")  # killed while writing it
    assert cache.read("u", "t", 3000, 1000, 1000, fetch) == BODY[1000:2000]
    for path in sorted(cache.folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    cache.folder.rmdir()
    assert cache.read("u", "t", 3000, 500, 2500, fetch) == BODY[500:3000]


def test_cache_is_for_its_user_alone(tmp_path: Path) -> None:
    assert (BlockCache(tmp_path / "c").folder.stat().st_mode & 0o77) == 0


def _reader(cache: BlockCache, url: str, seed: int, results) -> None:  # type: ignore[no-untyped-def]
    storage = Storage(cache, tries=12, backoff=0.001, timeout=5)
    rng = np.random.default_rng(seed)
    good = True
    for _ in range(30):
        offset = int(rng.integers(0, len(BODY) - 3000))
        good &= storage.read(url, offset, 3000) == BODY[offset : offset + 3000]
    results.put(good)


def test_processes_share_the_blocks(server: Server, tmp_path: Path) -> None:
    server.files["/a.bin"] = BODY
    cache = BlockCache(tmp_path / "c", 1, 4096)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    readers = [context.Process(target=_reader, args=(cache, f"{server.url}/a.bin", seed, results)) for seed in range(3)]
    for reader in readers:
        reader.start()
    assert [results.get(timeout=60) for _ in readers] == [True] * 3
    for reader in readers:
        reader.join()
    ranges = [headers["Range"] for _, headers in server.requests if headers["Range"] != "bytes=0-0"]
    assert len(ranges) == len(set(ranges))  # no block came twice


def test_forked_child_does_not_share_the_connection(server: Server, tmp_path: Path) -> None:
    server.files["/a.bin"] = BODY
    storage, url = plain(tries=1), f"{server.url}/a.bin"  # a second attempt would hide answers that went astray
    storage.read(url, 0, 10)  # the parent has a connection now
    context = multiprocessing.get_context("fork")
    with context.Pool(2) as pool:
        jobs = [pool.apply_async(storage.read, (url, 100 * k, 5000)) for k in range(40)]
        for k in range(40):
            assert storage.read(url, 50 * k, 3000) == BODY[50 * k : 50 * k + 3000]
        assert [job.get(30) == BODY[100 * k : 100 * k + 5000] for k, job in enumerate(jobs)] == [True] * 40


def test_storage_pickles_small_and_without_handles(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(BODY)
    storage = Storage(BlockCache(tmp_path / "c"))
    storage.read(str(tmp_path / "a"), 0, 10)
    sent = pickle.dumps(storage)
    assert len(sent) < 1000
    assert pickle.loads(sent).read(str(tmp_path / "a"), 5, 5) == BODY[5:10]


# Settings


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"retries": 3}, "unknown keys.*retries"),
        ({"cache": {"size": 3}}, "unknown keys.*size"),
        ({"cache": {"block_mb": 0}}, "positive"),
        ({"cache": {"max_gb": "lots"}}, "positive"),
        ({"tries": 0}, "tries"),
        ({"timeout": "long"}, "timeout"),
        ({"cache": "/proc/nowhere"}, "cannot write to data.storage.cache.folder /proc/nowhere"),
    ],
)
def test_bad_settings_get_one_line(options: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        open_storage(**options)


def test_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_storage(cache=False, tries=3).cache is None
    made = open_storage(cache={"folder": tmp_path / "c", "max_gb": 2, "block_mb": 1}, timeout=7)
    assert made.cache == BlockCache(tmp_path / "c", 2.0, 1 << 20) and made.timeout == 7
    assert open_storage(cache=str(tmp_path / "d")).cache == BlockCache(tmp_path / "d")
    monkeypatch.setattr("medclip.data.cache.default_folder", lambda: Path("/proc/nowhere"))
    assert open_storage().cache is None  # nobody asked for it
