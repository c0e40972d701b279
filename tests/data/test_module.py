"""The data module: what a trainer gets, what a checkpoint holds, and what is refused."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl

from medclip.data.crop import RandomCrop
from medclip.data.module import PairData
from medclip.types import Preprocess, UserError
from tests.conftest import jpeg
from tests.data.test_pairs import Letters, keys, trace


def data(
    shards: Path | str, folder: Path, *, rank: int = 0, world: int = 1, setup: bool = True, **options: Any
) -> PairData:
    source = options.pop("source", {})
    config = {"urls": f"{shards}/*.tar"} | source if "sources" not in options else {}
    made = PairData(
        options.pop("sources", [config]),
        batch_size=options.pop("batch_size", 8),
        workers=0,
        crop=RandomCrop(),
        storage={"index": folder / "index", "cache": False},
        output=folder,
        **options,
    )
    model = SimpleNamespace(preprocess=Preprocess(size=(16, 16)), tokenizer=Letters())
    trainer = SimpleNamespace(global_rank=rank, world_size=world, lightning_module=SimpleNamespace(model=model))
    made.trainer = trainer  # type: ignore[assignment]
    if setup:
        made.setup("fit")
    return made


def table(folder: Path, good: int, without: int, **extra: Any) -> dict[str, Any]:
    """A source of rows that all show one image, of which some have no caption."""
    (folder / "a.jpg").write_bytes(jpeg(np.random.default_rng(0)))
    rows: list[dict[str, Any]] = [{"image": "a.jpg", "caption": "c", "key": f"k{i}"} for i in range(good)]
    rows += [{"image": "a.jpg", "key": f"bad{i}"} for i in range(without)]
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"table": str(folder / "t.jsonl")} | extra


def listed(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]


# Training


def test_resume_through_the_modules_state(shards: Path, tmp_path: Path) -> None:
    whole = [trace(batch) for batch in data(shards, tmp_path, epochs=2).train_dataloader()]
    first = data(shards, tmp_path, epochs=2)
    batches = iter(first.train_dataloader())
    before = [trace(next(batches)) for _ in range(7)]
    state = json.loads(json.dumps(first.state_dict()))  # plain numbers and strings, fit for any checkpoint
    second = data(shards, tmp_path, epochs=2)
    second.load_state_dict(state)
    assert before + [trace(batch) for batch in second.train_dataloader()] == whole


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"shuffle_buffer": 5},
        {"source": {"weight": 0.5}},
        {"source": {"filter": '"Microscopy" in primary_label'}},
        {"source": {"urls": "{shards}/0000[012].tar"}},
        {"source": {"split": {"by": "patient"}}},
    ],
)
def test_another_order_or_other_data_is_refused(shards: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    first = data(shards, tmp_path)
    next(iter(first.train_dataloader()))
    if "urls" in change.get("source", {}):
        change = {"source": {"urls": change["source"]["urls"].format(shards=shards)}}
    second = data(shards, tmp_path, **change)
    second.load_state_dict(first.state_dict())
    with pytest.raises(UserError, match=r"cannot resume.*65 samples"):
        second.train_dataloader()


def test_batch_size_ranks_and_workers_may_change(shards: Path, tmp_path: Path) -> None:
    first = data(shards, tmp_path, batch_size=5)
    batches = iter(first.train_dataloader())
    before = next(batches)["key"] + next(batches)["key"]
    after: list[str] = []
    for rank in range(3):
        second = data(shards, tmp_path, batch_size=4, rank=rank, world=3)
        second.load_state_dict(first.state_dict())
        after += keys(second.train_dataloader())
    assert len(before) == 10 and len(after) == 55 and len({*before, *after}) == 65


def test_new_run_has_no_state_to_load(shards: Path, tmp_path: Path) -> None:
    made = data(shards, tmp_path)
    assert made.state_dict() == {}
    made.load_state_dict({})
    assert len(keys(made.train_dataloader())) == 65


def test_setup_is_done_once(shards: Path, tmp_path: Path) -> None:
    made = data(shards, tmp_path)
    sources = made.sources
    made.setup("validate")
    assert made.sources is sources and len(made.train_dataloader()) == 9


def test_mark_without_sources(shards: Path, tmp_path: Path) -> None:
    empty = data(shards, tmp_path, setup=False)
    assert empty.mark() == data(shards, tmp_path, setup=False).mark() != data(shards, tmp_path).mark()
    some = data(shards, tmp_path)
    nothing = some.sources[0].select(np.zeros(65, bool))
    some.sources = [nothing]
    assert len(some.mark()) == 16


# Validation


def test_validation_is_whole_and_the_same_every_time(shards: Path, tmp_path: Path) -> None:
    made = data(shards, tmp_path, val_sources=[{"urls": f"{shards}/*.tar"}])
    (loader,) = made.val_dataloader()
    assert len(loader) == 9
    first = list(loader)
    assert len(set(keys(first))) == 65
    for _ in range(2):
        assert len(loader) == 9
        assert [trace(batch) for batch in loader] == [trace(batch) for batch in first]
    assert data(shards, tmp_path).val_dataloader() == []


class Steps(pl.LightningModule):
    """Counts what Lightning hands it."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = SimpleNamespace(preprocess=Preprocess(size=(16, 16)), tokenizer=Letters())
        self.trained: list[str] = []
        self.validated: list[list[str]] = []

    def configure_optimizers(self) -> None:
        return None

    def training_step(self, batch: Any, _: int) -> None:
        self.trained += batch["key"]

    def on_validation_epoch_start(self) -> None:
        self.validated.append([])

    def validation_step(self, batch: Any, _: int) -> None:
        self.validated[-1] += batch["key"]


@pytest.mark.filterwarnings("ignore")
def test_a_real_trainer_validates_again_and_again(shards: Path, tmp_path: Path) -> None:
    made = PairData(
        [{"urls": f"{shards}/*.tar"}],
        val_sources=[{"urls": f"{shards}/0000[12].tar"}],
        batch_size=8,
        workers=0,
        storage={"index": tmp_path / "index"},
        output=tmp_path,
    )
    steps = Steps()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, val_check_interval=3, num_sanity_val_steps=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(steps, made)
    assert len(steps.trained) == len(set(steps.trained)) == 65
    assert [len(keys) for keys in steps.validated] == [16, 25, 25, 25]  # the sanity check's two batches, then all


# What is left out on opening


def test_a_few_in_many_stop_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """600 of 20 000, though they are all the samples that the ledger has heard of so far."""
    with caplog.at_level(logging.WARNING):
        made = data("", tmp_path, sources=[table(tmp_path, 19_400, 600)])
    assert "600 samples left out (600 × missing caption)" in caplog.text
    loader = made.train_dataloader()
    assert len(listed(tmp_path)) == 600 and listed(tmp_path)[0]["reason"] == "missing caption"
    next(iter(loader))


def test_many_in_few_stop_the_run_before_it_begins(tmp_path: Path) -> None:
    made = data("", tmp_path, sources=[table(tmp_path, 90, 10)])
    with pytest.raises(
        UserError, match=r"10 of 100 samples are bad \(10 × missing caption\).*max_bad_fraction=0\.05; listed in"
    ):
        made.train_dataloader()
    assert len(listed(tmp_path)) == 10
    assert data("", tmp_path, sources=[table(tmp_path, 90, 10)], max_bad_fraction=0.1).train_dataloader()


def test_a_narrow_filter_does_not_change_the_share(tmp_path: Path) -> None:
    source = table(tmp_path, 970, 30, filter='key in ["k1", "k2", "k3"]')
    assert len(keys(data("", tmp_path, sources=[source]).train_dataloader())) == 3


def test_only_the_first_rank_lists_them(tmp_path: Path) -> None:
    data("", tmp_path, sources=[table(tmp_path, 99, 1)], rank=1, world=2).train_dataloader()
    assert not (tmp_path / "skipped.jsonl").exists()


# Bad input


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sources": []}, r"data\.sources is empty.*data\.sources\.0\.urls="),
        ({"decode": "fancy"}, "fast or exact"),
        ({"batch_size": 0}, "give a whole number, 1 or more"),
        ({"batch_size": "many"}, "data.batch_size is 'many'"),
        ({"epochs": 0}, "data.epochs is 0"),
        ({"epochs": 1.5}, "data.epochs is 1.5"),
        ({"shuffle_buffer": 0}, "data.shuffle_buffer is 0"),
        ({"max_bad_fraction": 2}, "give a share from 0 to 1"),
        ({"source": {"weight": 0.001}}, "make no batch: an epoch draws 0 samples"),
        ({"batch_size": 100, "drop_last": True}, "make no batch: an epoch draws 65 samples"),
        ({"batch_size": 40, "drop_last": True, "world": 2}, "make no batch.*2 ranks"),
    ],
)
def test_bad_options_get_one_line(shards: Path, tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        data(shards, tmp_path, **options).train_dataloader()
    assert "\n" not in str(caught.value)


# Cost of the import


def test_readers_import_without_lightning_hydra_or_open_clip() -> None:
    """A spawned reader process pays for every import."""
    code = (
        "import sys, medclip.data.pairs, medclip.data.sources, medclip.data.evalset, medclip.data.make_shards\n"
        "heavy = {'pytorch_lightning', 'hydra', 'open_clip', 'transformers', 'timm', 'sklearn', 'torchvision'}\n"
        "heavy |= {'pydicom'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
