"""Finished images kept in memory: the same bits, decoded once, in whatever process."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from medclip.data import tables
from medclip.data.crop import RandomCrop
from medclip.data.module import PairData
from medclip.data.remember import Remembered
from medclip.data.sources import open_sources
from medclip.types import Preprocess, UserError
from tests.conftest import jpeg
from tests.data.test_pairs import Letters

QUESTIONS: dict[str, Any] = {"phantoms": {"kind": "questions", "samples": 40, "size": 64, "per_patient": 8}}
LABELS = {"names": ["closed: yes", "closed: no", "open: left"], "from": "class", "field": "vqa.slot", "other": "zeros"}


def data(folder: Path, sources: list[dict[str, Any]], **options: Any) -> PairData:
    tokenizer = options.pop("tokenizer", Letters())
    made = PairData(
        sources, epochs=3, batch_size=8, storage={"index": folder, "cache": False}, shuffle_buffer=16, **options
    )
    model = SimpleNamespace(preprocess=Preprocess(size=(48, 48)), tokenizer=tokenizer)
    trainer = SimpleNamespace(global_rank=0, world_size=1, lightning_module=SimpleNamespace(model=model))
    made.trainer = trainer  # type: ignore[assignment]
    made.setup("fit")
    return made


def same(ours: PairData, theirs: PairData) -> bool:
    pairs = list(zip(ours.train_dataloader(), theirs.train_dataloader(), strict=True))
    assert len(pairs) >= 3
    return all(
        a["key"] == b["key"] and all(torch.equal(a[k], b[k]) for k in ("image", "text", "label")) for a, b in pairs
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_has_the_same_bits_with_and_without(tmp_path: Path, workers: int) -> None:
    plain = data(tmp_path, [QUESTIONS], labels=LABELS, workers=workers)
    kept = data(tmp_path, [QUESTIONS], labels=LABELS, workers=workers, remember=0.01)
    assert same(kept, plain)
    memory = kept._remembered[True]
    assert memory is not None and memory.count == 5 and memory.known.all()  # the workers filled our memory


def test_a_file_is_read_once_and_its_image_is_that_of_its_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(np.random.default_rng(i)))
    lines = [f'{{"image": "{i % 3}.jpg", "question": "q{i}?", "answer": "yes"}}\n' for i in range(24)]
    (tmp_path / "t.jsonl").write_text("".join(lines))
    config = {"table": str(tmp_path / "t.jsonl"), "questions": {"question": "question", "answer": "answer"}}
    made = data(tmp_path, [config], labels=LABELS, workers=0, remember=0.01)
    read: list[str] = []
    images: dict[str, torch.Tensor] = {}
    inside = tables.read_inside
    monkeypatch.setattr(tables, "read_inside", lambda root, name: read.append(name) or inside(root, name))
    for batch in made.train_dataloader():
        for row, key in enumerate(batch["key"]):
            first = images.setdefault(key[0], batch["image"][row].clone())
            assert torch.equal(batch["image"][row], first)
    assert not torch.equal(images["0"], images["1"])
    assert sorted(read) == ["0.jpg", "1.jpg", "2.jpg"]


def test_captions_from_the_text_member_are_read_each_time_and_are_right(tmp_path: Path) -> None:
    xray = {"phantoms": {"kind": "xray", "samples": 8, "size": 64}}
    labels = {"names": ["pneumothorax"], "from": "class", "field": "phantom.label", "other": "zeros"}
    plain = data(tmp_path, [xray], labels=labels, workers=0)
    assert same(data(tmp_path, [xray], labels=labels, workers=0, remember=0.01), plain)
    assert same(data(tmp_path, [xray], labels=labels, workers=0, remember=1e-5), plain)  # room for one


def test_room_for_some_is_told_and_validation_gets_what_is_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = 3 * 48 * 48
    with caplog.at_level(logging.WARNING):
        made = data(tmp_path, [QUESTIONS], val_sources=[QUESTIONS], labels=LABELS, workers=0, remember=7.5 * one / 1e9)
        for loader in (made.train_dataloader, made.val_dataloader, made.train_dataloader):
            loader()
    memory, rest = made._remembered[True], made._remembered[False]
    assert memory is not None and rest is not None and (memory.count, rest.count) == (5, 2)
    assert "there is room for 2 of 5 images" in caplog.text
    (source,) = open_sources([QUESTIONS], index=tmp_path)
    assert Remembered.of([source], (48, 48), one - 1) is None


def test_another_process_that_was_not_forked_begins_with_nothing(tmp_path: Path) -> None:
    (source,) = open_sources([QUESTIONS], index=tmp_path)
    memory = Remembered.of([source, source], (8, 8), 10**6)
    assert memory is not None and memory.count == 10  # sources may call different images the same
    memory.put(3, np.full((8, 8, 3), 7, np.uint8))
    assert memory.get(0) is not None and memory.get(8) is None and memory.get(43) is None
    assert pickle.loads(pickle.dumps(memory)).get(3) is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"remember": -1}, "data.remember is -1: give GB"),
        ({"remember": True}, "data.remember is True"),
        ({"remember": 1, "crop": RandomCrop()}, r"leave these out \(data.crop=null\), or set data.remember=0"),
    ],
)
def test_what_cannot_be_remembered_is_refused(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        data(tmp_path, [QUESTIONS], labels=LABELS, **options)
