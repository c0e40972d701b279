"""The loader: one stream, whatever reads it, wherever it was cut, on however many ranks."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from medclip.data.cache import BlockCache
from medclip.data.crop import RandomCrop
from medclip.data.ledger import Ledger
from medclip.data.order import EpochOrder, Part, Plan
from medclip.data.pairs import PairLoader, PairReader
from medclip.data.raw import Source
from medclip.data.sources import open_sources
from medclip.data.storage import Storage
from medclip.types import Batch, Preprocess, UserError
from tests.conftest import jpeg, write_tar
from tests.data.conftest import Server, now_and_then


class Letters:
    """A tokenizer whose tokens are the letters."""

    context_length = 24

    def count(self, text: str) -> int:
        return len(text)

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        rows = [texts] if isinstance(texts, str) else texts
        return torch.tensor([[ord(c) for c in text[:24].ljust(24)] for text in rows])


def loader(
    sources: Sequence[Source],
    *,
    batch: int = 8,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    epochs: int = 2,
    buffer: int = 30,
    ledger: Ledger | None = None,
    drop_last: bool = False,
    shuffle: bool = True,
    storage: Storage | None = None,
    **more: Any,
) -> PairLoader:
    options = {"max_pixels": more.pop("max_pixels")} if "max_pixels" in more else {}
    reader = PairReader(
        sources=sources,
        captions=[source.caption for source in sources],
        preprocess=Preprocess(size=(16, 16)),
        tokenizer=Letters(),
        crop=RandomCrop(scale=(0.4, 1.0)),
        seed=7,
        batch_size=batch,
        storage=storage,
        **options,
    )
    parts = [Part(len(source), source.chunks, source.weight) for source in sources]
    order = EpochOrder(parts, seed=7, buffer=buffer, shuffle=shuffle)
    plan = Plan(batch, rank, world, drop_last)
    return PairLoader(
        reader, order, plan, ledger or Ledger(None, max_bad_fraction=1), epochs=epochs, workers=workers, **more
    )


@pytest.fixture(scope="module")
def sources(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    """65 pairs in four shards, and 20 in a table of which half is drawn in each epoch; captions are drawn as well."""
    folder = tmp_path_factory.mktemp("table")
    rng = np.random.default_rng(5)
    lines = []
    for i in range(20):
        (folder / f"{i}.jpg").write_bytes(jpeg(rng, 60, 90))
        lines.append(f'{{"image": "{i}.jpg", "caption": "one {i}", "other": "two {i}"}}')
    (folder / "t.jsonl").write_text("\n".join(lines))
    configs = [
        {"urls": f"{shards}/*.tar"},
        {"table": str(folder / "t.jsonl"), "weight": 0.5, "caption": ["txt", "other"]},
    ]
    return open_sources(configs, index=folder / "index")


def trace(batch: Batch) -> tuple[Any, ...]:
    rows = len(batch["key"])
    pixels = hashlib.sha256(batch["image"][:rows].numpy().tobytes()).hexdigest()
    return (*batch["key"], pixels, batch["text"][:rows].tolist(), batch["skipped"], batch["epoch"], batch["position"])


def keys(batches: Iterator[Batch] | Sequence[Batch] | PairLoader) -> list[str]:
    return [key for batch in batches for key in batch["key"]]


# One stream


@pytest.fixture(scope="module")
def stream(sources: list[Source]) -> list[tuple[Any, ...]]:
    return [trace(batch) for batch in loader(sources)]


def test_stream_has_every_sample_of_each_epoch(sources: list[Source]) -> None:
    batches = list(loader(sources))
    assert len(batches) == len(loader(sources)) == 2 * 10
    for epoch in (0, 1):
        seen = Counter(keys([b for b in batches if b["epoch"] == epoch]))
        assert len(seen) == 75 and set(seen.values()) == {1}
    table = [key for key in keys(batches) if key.endswith(".jpg")]
    assert sorted(table) == sorted(f"{i}.jpg" for i in range(20))  # half in each epoch, all after two


def test_both_captions_are_drawn_and_crops_differ_between_epochs(sources: list[Source]) -> None:
    only = loader(sources[1:], epochs=8, batch=10)
    firsts = Counter(
        "".join(map(chr, row))[:3] for batch in only for row in batch["text"][: len(batch["key"])].tolist()
    )
    assert set(firsts) == {"one", "two"} and min(firsts.values()) > 20
    images: dict[str, set[bytes]] = {}
    for batch in loader(sources[:1], epochs=2):
        for key, image in zip(batch["key"], batch["image"], strict=False):
            images.setdefault(key, set()).add(image.numpy().tobytes())
    assert all(len(seen) == 2 for seen in images.values())


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_gives_the_same_stream(sources: list[Source], stream: Any, workers: int) -> None:
    assert [trace(batch) for batch in loader(sources, workers=workers)] == stream


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_fewer_shards_than_workers(shards: Path, tmp_path: Path) -> None:
    one = open_sources([{"urls": str(shards / "00003.tar")}], index=tmp_path)  # three samples
    expected = [trace(batch) for batch in loader(one, batch=2)]
    assert [trace(batch) for batch in loader(one, batch=2, workers=4)] == expected
    assert len(expected) == 4


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 20))
def test_resume_at_any_step(sources: list[Source], stream: Any, step: int) -> None:
    first = loader(sources)
    batches = iter(first)
    before = [trace(next(batches)) for _ in range(step)]
    state = pickle.loads(pickle.dumps(first.state_dict()))
    second = loader(sources)
    second.load_state_dict(state)
    assert len(second) == 20
    assert before + [trace(batch) for batch in second] == stream


def test_resume_with_workers_after_batches_that_were_read_ahead(sources: list[Source], stream: Any) -> None:
    first = loader(sources, workers=2)
    batches = iter(first)
    before = [trace(next(batches)) for _ in range(7)]
    state = first.state_dict()  # the workers are far ahead by now
    del batches
    second = loader(sources, workers=1)
    second.load_state_dict(state)
    assert before + [trace(batch) for batch in second] == stream


def test_finished_run_has_nothing_left(sources: list[Source]) -> None:
    first = loader(sources)
    assert len(list(first)) == 20
    second = loader(sources)
    second.load_state_dict(first.state_dict())
    assert list(second) == [] and len(second) == 20


def test_anew_begins_anew(sources: list[Source]) -> None:
    """Validation passes over the same loader many times, and may stop in the middle."""
    validation = loader(sources, epochs=1, anew=True, shuffle=False)
    first = [trace(batch) for batch in validation]
    batches = iter(validation)
    next(batches), next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert len(validation) == len(first) == 10
    assert [trace(batch) for batch in validation] == first


# Ranks


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_ranks_get_equal_batches_and_each_sample_once(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], world: int, batch: int, drop_last: bool
) -> None:
    folder = tmp_path_factory.mktemp("ranks")
    image = jpeg(np.random.default_rng(0), 20, 20)
    for s, n in enumerate(lengths):
        write_tar(folder / f"{s}.tar", [{"key": b"%d-%d" % (s, i), "jpg": image, "txt": b"t"} for i in range(n)])
    sources = open_sources([{"urls": str(folder)}], index=folder / "index")
    ranks = [
        list(loader(sources, batch=batch, rank=r, world=world, drop_last=drop_last, epochs=1)) for r in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(b["image"].shape[0] == batch for batches in ranks for b in batches)  # the same shape everywhere
    seen = Counter(key for batches in ranks for key in keys(batches))
    assert not seen or set(seen.values()) == {1}
    total = sum(lengths)
    assert len(seen) == (total - total % (batch * world) if drop_last else total)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.integers(0, 12))
def test_another_world_size_in_the_middle_of_an_epoch(
    sources: list[Source], world: int, world2: int, batch: int, batch2: int, steps: int
) -> None:
    before, states = [], []
    for rank in range(world):
        first = loader(sources, batch=batch, rank=rank, world=world, epochs=1)
        batches = iter(first)
        for _ in range(min(steps, len(first))):
            before += next(batches)["key"]
        states.append(first.state_dict())
    assert all(state == states[0] for state in states)
    after = []
    for rank in range(world2):
        second = loader(sources, batch=batch2, rank=rank, world=world2, epochs=1)
        second.load_state_dict(states[0])
        after += keys(second)
    assert len(before) + len(after) == 75 and len({*before, *after}) == 75


def test_a_sample_is_the_same_on_any_number_of_ranks(sources: list[Source]) -> None:
    def images(world: int) -> dict[str, tuple[bytes, list[int]]]:
        found = {}
        for rank in range(world):
            for batch in loader(sources, rank=rank, world=world, epochs=1):
                rows = zip(batch["key"], batch["image"], batch["text"], strict=False)
                found |= {key: (image.numpy().tobytes(), text.tolist()) for key, image, text in rows}
        return found

    assert images(1) == images(3)


# The mixture


def test_shards_written_concept_by_concept_come_out_mixed(tmp_path: Path) -> None:
    """The largest share that one concept has of a batch: all of it in file order, chance after the shuffle."""
    concepts, each = 20, 300
    for c in range(concepts):
        write_tar(tmp_path / f"{c:02d}.tar", [{"key": b"%d-%d" % (c, i), "jpg": b"", "txt": b""} for i in range(each)])
    (source,) = open_sources([{"urls": str(tmp_path)}], index=tmp_path / "index")
    part = Part(len(source), source.chunks)

    def purity(order: EpochOrder) -> float:
        concept = order.ids(0) // each
        return float(np.mean([np.bincount(concept[i : i + 64]).max() / 64 for i in range(0, len(concept) - 64, 64)]))

    chance = np.random.default_rng(0).permutation(np.repeat(np.arange(concepts), each))
    by_chance = float(np.mean([np.bincount(chance[i : i + 64]).max() / 64 for i in range(0, len(chance) - 64, 64)]))
    assert purity(EpochOrder([part], seed=0, shuffle=False)) > 0.9
    assert purity(EpochOrder([part], seed=0)) < 1.05 * by_chance
    assert purity(EpochOrder([part], seed=0, buffer=3000)) < 2 * by_chance  # a buffer of half the set


# Bad samples


def png_bomb(side: int) -> bytes:
    """A PNG whose header promises side x side pixels, and that has none: whoever decodes it finds it broken."""
    out = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b"")):
        out += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return out


@pytest.fixture
def mixed(tmp_path: Path) -> list[Source]:
    """20 samples, of which six are bad when they are read."""
    rng = np.random.default_rng(0)
    samples: list[dict[str, bytes]] = [{"key": b"k%02d" % i, "jpg": jpeg(rng), "txt": b"t %d" % i} for i in range(20)]
    samples[3]["jpg"] = samples[3]["jpg"][:300]
    samples[5]["jpg"] = b"no image"
    samples[7] |= {"jpg": png_bomb(12_000)}
    samples[11]["txt"] = b"  "
    samples[13]["txt"] = b"No caption found"
    out = io.BytesIO()
    Image.new("RGB", (300, 300)).save(out, "jpeg")
    samples[17]["jpg"] = out.getvalue()
    write_tar(tmp_path / "0.tar", samples)
    return open_sources([{"urls": str(tmp_path / "0.tar")}], index=tmp_path / "index")


BAD = {
    "k03": "broken image",
    "k05": "broken image",
    "k07": "over pixel limit",
    "k11": "empty caption",
    "k13": "empty caption",
    "k17": "over pixel limit",
}


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_skipped_counted_and_listed(mixed: list[Source], tmp_path: Path, workers: int) -> None:
    ledger = Ledger(tmp_path / "skipped.jsonl", max_bad_fraction=0.5)
    batches = list(loader(mixed, epochs=3, batch=6, ledger=ledger, workers=workers, max_pixels=80_000))
    good = {f"k{i:02d}" for i in range(20)} - set(BAD)
    assert Counter(keys(batches)) == dict.fromkeys(good, 3)
    assert sum(batch["skipped"] for batch in batches) == ledger.bad == 3 * len(BAD)
    assert ledger.seen == 60
    rows = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert {row["key"]: row["reason"] for row in rows} == BAD and len(rows) == len(BAD)
    assert all(len(batch["key"]) + batch["skipped"] <= 6 and batch["image"].shape[0] == 6 for batch in batches)
    assert "12000 x 12000" in next(row["detail"] for row in rows if row["key"] == "k07")


def test_too_many_bad_samples_end_the_run_with_one_line(mixed: list[Source], tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "skipped.jsonl", max_bad_fraction=0.2, grace=10)
    with pytest.raises(
        UserError, match=r"samples are bad \(.*× .*\), more than data.max_bad_fraction=0.2; listed in"
    ) as caught:
        list(loader(mixed, epochs=3, batch=5, ledger=ledger))
    assert "\n" not in str(caught.value)
    short = Ledger(None, max_bad_fraction=0.2)  # a run that is over before its grace
    with pytest.raises(UserError, match="5 of 20"):
        list(loader(mixed, epochs=1, ledger=short, max_pixels=100_000))


def test_batch_of_which_nothing_is_left(tmp_path: Path) -> None:
    samples = [{"key": b"k%d" % i, "jpg": b"no image", "txt": b"t"} for i in range(4)]
    samples.append({"key": b"good", "jpg": jpeg(np.random.default_rng(0)), "txt": b"t"})
    write_tar(tmp_path / "0.tar", samples)
    sources = open_sources([{"urls": str(tmp_path / "0.tar")}], index=tmp_path / "index")
    batches = list(loader(sources, batch=2, epochs=1, shuffle=False))
    assert [len(batch["key"]) for batch in batches] == [0, 0, 1]
    assert all(batch["image"].shape == (2, 3, 16, 16) and batch["text"].shape == (2, 24) for batch in batches)
    assert not batches[0]["image"].any() and not batches[0]["text"].any()


# From a server


def test_stream_from_a_server_that_fails_now_and_then_is_the_local_one(
    shards: Path, server: Server, tmp_path: Path
) -> None:
    local = open_sources([{"urls": f"{shards}/*.tar"}], index=tmp_path / "index")
    expected = [trace(batch) for batch in loader(local)]
    for path in shards.glob("*.tar"):
        server.files[f"/{path.name}"] = path.read_bytes()
    server.fail = now_and_then(0.35, seed=1)
    urls = f"{server.url}/{{00000..00003}}.tar"
    for workers in (0, 2):
        storage = Storage(BlockCache(tmp_path / f"blocks{workers}", 1, 16384), tries=25, backoff=0.001, timeout=5)
        remote = open_sources([{"urls": urls}], index=tmp_path / "index", storage=storage)
        assert [trace(batch) for batch in loader(remote, workers=workers, storage=storage)] == expected
    assert sum(count for kind, count in server.answered.items() if kind is not None) > 10


def test_a_server_that_goes_away_makes_bad_samples(shards: Path, server: Server, tmp_path: Path) -> None:
    server.files["/0.tar"] = (shards / "00001.tar").read_bytes()
    storage = Storage(None, tries=2, backoff=0.001, timeout=5)
    sources = open_sources([{"urls": f"{server.url}/0.tar"}], index=tmp_path / "index", storage=storage)
    server.fail = lambda number, path: 503
    ledger = Ledger(None, max_bad_fraction=0.05)
    with pytest.raises(UserError, match=r"5 of 5 samples are bad \(5 × read error"):
        list(loader(sources, epochs=1, ledger=ledger, storage=storage))


@pytest.mark.parametrize("workers", [0, 1])
def test_training_fetches_ahead(shards: Path, server: Server, tmp_path: Path, workers: int) -> None:
    """The blocks are asked for by the main process; the readers find them in the cache."""
    for path in shards.glob("*.tar"):
        server.files[f"/{path.name}"] = path.read_bytes()
    storage = Storage(BlockCache(tmp_path / "blocks", 1, 16384), tries=3, backoff=0.001, timeout=5)
    urls = f"{server.url}/{{00000..00003}}.tar"
    sources = open_sources([{"urls": urls}], index=tmp_path / "index", storage=storage)
    wanted: list[str] = []
    fetch = storage.prefetch

    def noted(url: str, offset: int, length: int) -> None:
        wanted.append(url)
        fetch(url, offset, length)

    storage.prefetch = noted  # type: ignore[method-assign]
    assert len(keys(loader(sources, epochs=1, workers=workers, storage=storage))) == 65
    assert {url.rpartition("/")[2] for url in wanted} == {f"0000{i}.tar" for i in range(4)}


def test_reader_pickles_small_for_workers_that_are_spawned(sources: list[Source]) -> None:
    made = loader(sources)
    ticket = next(made.plan.tickets(made.order, 0))
    sent = pickle.dumps(made.reader)
    assert len(sent) < 60_000
    again: PairReader = pickle.loads(sent)
    assert trace(again[ticket][0]) == trace(made.reader[ticket][0])
