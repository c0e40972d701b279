"""Shards as BIOMEDICA, open_clip and CLIP_benchmark write them, and what is left out of them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from medclip.data import shards as module
from medclip.data.bad import BadSample
from medclip.data.captions import CaptionRule
from medclip.data.evalset import EvalSet
from medclip.data.shards import ShardSource, parse_json
from medclip.data.sources import open_sources
from medclip.data.storage import Storage
from medclip.types import Preprocess, UserError
from tests.conftest import jpeg, write_tar
from tests.data.conftest import Server

Samples = list[dict[str, bytes]]
RNG = np.random.default_rng(0)
IMAGE = jpeg(RNG)


def biomedica(count: int = 4, **extra: Any) -> Samples:
    return [
        {
            "key": f"3-PMC{i}.2-0-fig.{i}".encode(),
            "jpg": jpeg(RNG),
            "txt": f"Figure {i}: a lung.".encode(),
            "json": orjson.dumps({"image_primary_label": ["Microscopy"], "article_license": "CC BY", "n": i} | extra),
        }
        for i in range(count)
    ]


def source(folder: Path, samples: Samples | list[Samples], **config: Any) -> Any:
    every = samples if samples and isinstance(samples[0], list) else [samples]
    for i, some in enumerate(every):
        write_tar(folder / f"{i:05d}.tar", some)  # pyright: ignore[reportArgumentType]
    return open_sources([{"urls": f"{folder}/*.tar"} | config], index=folder / "index")[0]


# Layouts


def test_biomedica(tmp_path: Path) -> None:
    samples = biomedica()
    found = source(tmp_path, samples)
    assert [found.key(i) for i in range(4)] == [s["key"].decode() for s in samples]
    raw = found.read(2, want_meta=True)
    assert (raw.key, raw.image, raw.text) == ("3-PMC2.2-0-fig.2", samples[2]["jpg"], "Figure 2: a lung.")
    assert raw.meta == {"image_primary_label": ["Microscopy"], "article_license": "CC BY", "n": 2}
    assert found.fields(1) == {"key": "3-PMC1.2-0-fig.1", "caption": "Figure 1: a lung."} | orjson.loads(
        samples[1]["json"]
    )


def test_open_clip_with_images_of_several_kinds(tmp_path: Path) -> None:
    samples = [
        {"key": b"000000%d" % i, kind: b"%d" % i, "txt": b"t"} for i, kind in enumerate(("jpg", "png", "webp", "jpeg"))
    ]
    found = source(tmp_path, samples)
    assert [found.read(i).image for i in range(4)] == [b"0", b"1", b"2", b"3"]
    assert found.read(0).meta is None


def test_folders_in_keys(tmp_path: Path) -> None:
    found = source(tmp_path, [{"key": b"./a/b.c/x.y", "jpg": b"1", "txt": b"t"}])
    assert found.key(0) == "a/b.c/x.y"


@pytest.mark.parametrize("place", ["test", "."])
def test_clip_benchmark_classification(tmp_path: Path, place: str) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / place / "classnames.txt").write_text("lung cancer\r\nnormal, of\n")
    samples = [{"key": b"s%07d" % i, "webp": b"%d" % i, "cls": b"%d\n" % (i % 2)} for i in range(4)]
    found = source(tmp_path / "test", samples, caption=False)
    assert found.fields(1) == {"key": "s0000001", "caption": None, "cls": 1, "label": "normal, of"}
    # Class names make captions too, though there is no json.
    named = source(tmp_path / "test", samples, caption="label")
    assert [CaptionRule(("label",)).all(named.read(i)) for i in (0, 1)] == [["lung cancer"], ["normal, of"]]
    chosen = source(tmp_path / "test", samples, caption=False, filter='label == "lung cancer"')
    assert [chosen.key(i) for i in range(len(chosen))] == ["s0000000", "s0000002"]


def test_clip_benchmark_class_numbers_out_of_range(tmp_path: Path) -> None:
    (tmp_path / "classnames.txt").write_text("a\nb\n")
    found = source(
        tmp_path, [{"key": b"0", "jpg": b"", "cls": b"2"}, {"key": b"1", "jpg": b"", "cls": b"x"}], caption=False
    )
    for i in (0, 1):
        with pytest.raises(BadSample, match="broken metadata"):
            found.fields(i)


def test_clip_benchmark_retrieval_has_a_caption_a_line(tmp_path: Path) -> None:
    samples = [{"key": b"s%d" % i, "jpg": IMAGE, "txt": b"a lung %d\nthe lung %d\n" % (i, i)} for i in range(3)]
    write_tar(tmp_path / "0.tar", samples)
    rule = {"field": "txt", "lines": True}
    (batch,) = EvalSet([{"urls": str(tmp_path / "0.tar")}], captions=rule, index=tmp_path / "i").batches(
        Preprocess((16, 16))
    )
    assert [meta["captions"] for meta in batch["meta"]] == [[f"a lung {i}", f"the lung {i}"] for i in range(3)]


def test_class_names_from_a_server(server: Server, remote: Storage, tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [{"key": b"k", "jpg": b"1", "cls": b"1"}])
    server.files |= {"/test/0.tar": (tmp_path / "0.tar").read_bytes(), "/classnames.txt": b"a\nb"}
    found = open_sources([{"urls": f"{server.url}/test/0.tar", "caption": False}], index=tmp_path, storage=remote)[0]
    assert found.fields(0)["label"] == "b"


# Metadata is read when it is needed, and only then


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(raw: bytes) -> dict[str, Any]:
        raise AssertionError("metadata was parsed")

    monkeypatch.setattr(module, "parse_json", never)


def test_plain_captions_parse_no_json(tmp_path: Path, poison: None) -> None:
    found = source(tmp_path, biomedica())
    assert [found.read(i).text for i in range(4)] == [f"Figure {i}: a lung." for i in range(4)]
    with pytest.raises(AssertionError, match="parsed"):
        found.read(0, want_meta=True)  # so the poison works


def test_plain_captions_do_not_even_read_it(tmp_path: Path) -> None:
    reads: list[tuple[int, int]] = []

    class Watched(Storage):
        def read(self, url: str, offset: int, length: int) -> bytes:
            reads.append((offset, length))
            return super().read(url, offset, length)

    write_tar(tmp_path / "0.tar", biomedica(1, article_text="long " * 1000))
    found = open_sources([{"urls": str(tmp_path / "0.tar")}], index=tmp_path, storage=Watched(None))[0]
    found.read(0)
    assert sum(length for _, length in reads) < 5000


@pytest.mark.parametrize("config", [{"caption": "n"}, {"filter": "n >= 0"}, {"split": {"by": "n"}}])
def test_rules_on_metadata_parse_it(tmp_path: Path, poison: None, config: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match="parsed"):
        source(tmp_path, biomedica(), **config).read(0)


def broken_third() -> Samples:
    samples = biomedica()
    samples[2]["json"] = b'{"n": 2, '
    return samples


def test_broken_json_is_no_matter_where_it_is_not_needed(tmp_path: Path) -> None:
    found = source(tmp_path, broken_third())
    assert len(found) == 4 and found.read(2).text == "Figure 2: a lung." and not found.problems


def test_broken_json_where_it_is_needed(tmp_path: Path) -> None:
    found = source(tmp_path, broken_third(), caption="n")
    with pytest.raises(BadSample, match="broken metadata"):
        found.read(2)
    assert found.read(3).meta["n"] == 3
    for _ in range(2):  # the second time from the kept answers
        kept = source(tmp_path, broken_third(), filter="n >= 1")
        assert [kept.key(i) for i in range(len(kept))] == ["3-PMC1.2-0-fig.1", "3-PMC3.2-0-fig.3"]
        assert [(key, reason) for key, reason, _ in kept.problems] == [("3-PMC2.2-0-fig.2", "broken metadata")]


def test_json_of_odd_writers() -> None:
    assert np.isnan(parse_json(b'{"a": NaN}')["a"])
    half = parse_json(b'{"a": "x\\ud800y", "b": [{"\\udfff": 1}]}')
    orjson.dumps(half)  # no text that cannot be written again
    assert half["a"] == "x?y"
    for raw in (b"[1]", b"3", b"", b"{", b"\xff\xfe{", b'{"a": ' + b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"):
        with pytest.raises(BadSample, match="broken metadata"):
            parse_json(raw)


# What is no pair


def test_what_lacks_something_is_left_out_and_listed(tmp_path: Path) -> None:
    samples: Samples = [
        {"key": b"whole", "jpg": b"1", "txt": b"t"},
        {"key": b"no-text", "jpg": b"1"},
        {"key": b"no-image", "txt": b"t", "json": b"{}"},
        {"key": b"also", "png": b"1", "caption": b"t"},
    ]
    found = source(tmp_path, samples)
    assert [found.key(i) for i in range(len(found))] == ["whole", "also"]
    assert [(k, r) for k, r, _ in found.problems] == [("no-image", "missing image"), ("no-text", "missing caption")]
    assert all("00000.tar" in detail for _, _, detail in found.problems)
    bare = source(tmp_path, samples, caption=False)
    assert [bare.key(i) for i in range(len(bare))] == ["whole", "no-text", "also"]


def test_one_of_several_fields_is_enough(tmp_path: Path) -> None:
    samples: Samples = [
        {"key": b"both", "jpg": b"1", "txt": b"t", "json": b'{"alt": "a"}'},
        {"key": b"text", "jpg": b"1", "txt": b"t"},
        {"key": b"meta", "jpg": b"1", "json": b'{"alt": "a"}'},
    ]
    found = source(tmp_path, samples, caption={"fields": ["txt", "alt"]})
    assert [found.caption.all(found.read(i)) for i in range(len(found))] == [["t", "a"], ["t"], ["a"]]
    only = source(tmp_path, samples, caption="alt")
    assert [only.key(i) for i in range(len(only))] == ["both", "meta"]
    assert [(k, r) for k, r, _ in only.problems] == [("text", "missing metadata")]


def test_cut_shard_keeps_the_rest(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", biomedica(3))
    write_tar(tmp_path / "00001.tar", biomedica(5))
    data = (tmp_path / "00000.tar").read_bytes()
    (tmp_path / "00000.tar").write_bytes(data[: data.index(b"fig.2.jpg") + 700])
    found = open_sources([{"urls": str(tmp_path)}], index=tmp_path / "index")[0]
    assert len(found) == 2 + 5
    assert [(k, r) for k, r, _ in found.problems] == [("3-PMC2.2-0-fig.2", "truncated tar")]
    (tmp_path / "00000.tar").write_bytes(b"")
    empty = open_sources([{"urls": str(tmp_path)}], index=tmp_path / "index")[0]
    assert len(empty) == 5 and [r for _, r, _ in empty.problems] == ["truncated tar"]


def test_nothing_usable_says_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no usable sample in 1 shards \(missing caption; members there are: cls, jpg\)"
    ):
        source(tmp_path, [{"key": b"a", "jpg": b"1", "cls": b"0"}])
    with pytest.raises(UserError, match="no sample; members there are: nothing"):
        source(tmp_path, [])


# As arithmetic


def test_chunks_and_rows_over_shards(tmp_path: Path) -> None:
    lengths = (700, 1, 256, 300)
    samples = [
        [{"key": b"%d-%d" % (s, i), "jpg": b"%d" % i, "txt": b"t"} for i in range(n)] for s, n in enumerate(lengths)
    ]
    found = source(tmp_path, samples)
    assert len(found) == sum(lengths)
    bounds = np.cumsum([0, *lengths])
    sizes = np.diff([*found.chunks, len(found)])
    assert set(bounds[:-1]) <= set(found.chunks.tolist())  # no chunk reaches over two shards
    assert sizes.max() <= 256 and found.chunks[0] == 0 and (sizes > 0).all()
    mask = np.random.default_rng(0).random(len(found)) < 0.3
    some = found.select(mask)
    assert [some.key(i) for i in range(len(some))] == [found.key(int(i)) for i in np.flatnonzero(mask)]
    again = some.select(np.arange(0, len(some), 2))
    assert [again.read(i).image for i in range(3)] == [some.read(2 * i).image for i in range(3)]
    assert found.fingerprint() != some.fingerprint() != again.fingerprint()
    assert found.select(np.ones(len(found), bool)).fingerprint() == found.fingerprint()


def test_extents_cover_what_is_read_and_are_none_for_files(tmp_path: Path, server: Server, remote: Storage) -> None:
    assert source(tmp_path, biomedica(2)).extents(0) is None
    data = (tmp_path / "00000.tar").read_bytes()
    server.files["/a.tar"] = data
    for caption in (None, "n"):
        config = {"urls": f"{server.url}/a.tar", "caption": caption}
        found = open_sources([config], index=tmp_path / "index", storage=remote)[0]
        url, offset, length = found.extents(1)
        assert url == f"{server.url}/a.tar"
        raw = found.read(1)
        for content in (raw.image, raw.text.encode(), *([orjson.dumps(raw.meta)] if caption else [])):
            assert content in data[offset : offset + length]


def test_signed_urls_keep_their_secret(server: Server, remote: Storage, tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [{"key": b"k", "jpg": b"1", "txt": b"t"}, {"key": b"l", "jpg": b"1"}])
    server.files["/s/0.tar"] = (tmp_path / "0.tar").read_bytes()
    url = f"{server.url}/s/0.tar?sig=secret"
    found = open_sources([{"urls": url}], index=tmp_path / "index", storage=remote)[0]
    assert found.name == "s/0.tar" and "secret" not in repr(found.problems)
    with pytest.raises(UserError) as caught:
        open_sources([{"urls": url, "filter": "nosuch == 1"}], index=tmp_path / "index", storage=remote)
    assert "secret" not in str(caught.value)
    with pytest.raises(UserError) as both:
        open_sources([{"urls": url, "folder": "x"}], index=tmp_path / "index", storage=remote)
    assert "secret" not in str(both.value)


def test_pickles_small_and_reads_the_same(tmp_path: Path) -> None:
    samples = [{"key": b"%07d-PMC%d" % (i, i), "jpg": b"%d" % i, "txt": b"t"} for i in range(3000)]
    found = source(tmp_path, samples)
    found.read(0)
    sent = pickle.dumps(found)
    assert len(sent) < 3000 * 100
    again: ShardSource = pickle.loads(sent)
    assert again.read(1234).image == b"1234" and again.fingerprint() == found.fingerprint()
