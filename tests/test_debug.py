"""debug=fast, overfit, profile and trace do what their yaml says, for three kinds of training."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir

from medclip.callbacks.profile import profile_table, short
from medclip.config import CONF
from medclip.train import train

XRAYS = "{phantoms: {kind: xray, samples: %d, size: 64, seed: %d}}"
SOURCES = [f"data.sources=[{XRAYS % (40, 0)}]", "data.batch_size=4", "trainer.accelerator=cpu", "trainer.devices=1"]
TOYS = {
    "clip": ["model=tiny_vit", "model.architecture.vision_cfg.layers=1", "model.architecture.text_cfg.layers=1"],
    "mae_cxr": ["experiment=mae_cxr", "model=mae_tiny", "data.val_sources=[]", "data.group=null", "task.lr_batch=null"],
    "thorax": [
        *("experiment=thorax", "model=vit_tiny", "task.lr_batch=null", "data.group=phantom.patient"),
        "data.labels={names: [pneumothorax, cardiomegaly], from: class, field: phantom.label, other: zeros}",
        f"data.val_sources=[{XRAYS % (8, 1)}]",
    ],
}


def run(kind: str, output: Path, *words: str) -> pl.Trainer:
    torch.set_num_threads(1)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        precision = "trainer.precision=32-true"
        cfg = compose("train", [*TOYS[kind], *SOURCES, precision, f"output={output}", "data.workers=0", *words])
    return train(cfg)


class Recorder(pl.Callback):
    """Keys and loss of every step."""

    def __init__(self) -> None:
        self.keys: list[list[str]] = []
        self.texts: list[Any] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.keys.append(batch["key"])
        self.texts.append(batch.get("text"))
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


def recorded(trainer: pl.Trainer) -> Recorder:
    return next(callback for callback in trainer.callbacks if isinstance(callback, Recorder))  # type: ignore[attr-defined]


RECORD = f"+callbacks.recorder={{_target_: {__name__}.Recorder}}"


@pytest.mark.parametrize("kind", TOYS)
def test_fast_is_two_steps_and_no_checkpoint(kind: str, tmp_path: Path) -> None:
    run(kind, tmp_path / "run", "debug=fast")
    trainer = run(kind, tmp_path / "run", "debug=fast")  # what it leaves is in nobody's way
    assert trainer.global_step == 2
    assert not list(tmp_path.rglob("*.ckpt")) and not list(tmp_path.rglob("metrics.csv"))
    if kind == "thorax":
        assert "val/loss" in trainer.callback_metrics


def test_overfit_reads_the_first_batches_again(tmp_path: Path) -> None:
    words = ["callbacks=[none]", RECORD, "logger=[none]"]
    again = recorded(run("clip", tmp_path / "again", "debug=overfit", "epochs=3", *words)).keys
    assert len(again) == 12 and again[:4] == again[4:8] == again[8:]
    assert len({key for keys in again for key in keys}) == 16
    line = recorded(run("clip", tmp_path / "line", "max_steps=4", "data.crop=null", *words)).keys
    assert again[:4] == line  # as the run itself begins


def floor(texts: list[torch.Tensor]) -> float:
    """Of the contrastive loss by hand: m rows of a batch with one text cannot be told apart, log(m) for each."""
    rows = [[tuple(row) for row in batch.tolist()] for batch in texts]
    each = [math.log(counts[row]) for batch in rows for counts in [Counter(batch)] for row in batch]
    return sum(each) / len(each)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip", "thorax"])
def test_overfit_reaches_the_floor_of_the_loss(kind: str, tmp_path: Path) -> None:
    words = ["debug=overfit", "optim.lr=1e-3", "task.schedule.warmup=0.05", "callbacks=[default]", RECORD, "epochs=100"]
    seen = recorded(run(kind, tmp_path / "run", *words))
    lowest = floor(seen.texts[:4]) if kind == "clip" else 0.0
    first, last = (sum(losses) / 4 for losses in (seen.losses[:4], seen.losses[-4:]))
    assert last - lowest < 0.1 * (first - lowest), (first, last, lowest)


@pytest.mark.slow
def test_overfit_of_a_masked_autoencoder_beats_seeing_new_images(tmp_path: Path) -> None:
    """Its floor is not known, and its masks are new each time: it must reach less than training on ever new images."""
    words = ["optim.lr=1e-3", "task.schedule.warmup=0.05", "callbacks=[default]", RECORD]
    seen = recorded(run("mae_cxr", tmp_path / "run", "debug=overfit", "epochs=100", *words)).losses
    new = ["epochs=1", "data.crop=null", "data.flip=0", f"data.sources=[{XRAYS % (1600, 0)}]"]
    other = recorded(run("mae_cxr", tmp_path / "other", *words, *new)).losses
    assert len(seen) == len(other) == 400
    assert sum(seen[-40:]) < sum(other[-40:]) and sum(seen[-40:]) < 0.9 * sum(seen[:40])


@pytest.mark.parametrize("kind", TOYS)
def test_profile_prints_what_takes_the_time(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["debug=profile", "max_steps=2", "callbacks=[none]"]
    assert run(kind, tmp_path / "run", *words).global_step == 2
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    lines = [line for line in lines if line.split("│")[2].strip()]  # not what goes on with a long name
    assert 5 <= len(lines) <= 15
    assert lines[0].split("│")[-2].strip() == "100.0 %"  # of the longest
    rows = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in lines}
    assert any(name.endswith("optimizer_step") and calls == "2" for name, calls in rows.items()), rows


def test_the_table_by_hand() -> None:
    table = profile_table({"a": [0.5, 1.5], "b": [3.0], "[X]p.q.Thing{'x': 1.5}.on_end": [1.0], "never": []}, rows=3)
    columns = [list(column.cells) for column in table.columns]
    assert columns[0] == ["b", "a", "Thing.on_end"] and columns[1] == ["1", "2", "1"]
    assert columns[2] == ["3000.0", "1000.0", "1000.0"] and columns[4] == ["100.0 %", "66.7 %", "33.3 %"]
    assert short("run_training_epoch") == "run_training_epoch"


def test_trace_is_a_timeline(tmp_path: Path) -> None:
    run("clip", tmp_path / "run", "debug=trace", "callbacks=[none]")
    (trace,) = (tmp_path / "run").glob("*.pt.trace.json")
    names = {event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "aten::addmm" in names
    assert "aten::mm" in (tmp_path / "run" / "fit-profile.txt").read_text()
