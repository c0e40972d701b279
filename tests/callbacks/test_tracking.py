"""What a run tells: rate, data wait, progress line, metrics.csv, provenance, W&B's mode."""

from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from medclip.callbacks import wandb
from medclip.callbacks.checkpoint import LastCheckpoint
from medclip.callbacks.metrics import MetricsCsv
from medclip.callbacks.progress import Progress
from medclip.callbacks.provenance import Provenance, revision, without_secrets
from medclip.callbacks.storage import AtomicCheckpointIO
from medclip.callbacks.throughput import Throughput
from medclip.callbacks.vitals import Vitals


class Clock:
    """Time that passes only where it is said to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds


class Busy(pl.Callback):
    """A step of a second."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_before_backward(self, *_: Any) -> None:
        self.clock.pass_(1.0)


def test_data_wait_is_the_datas_alone(tmp_path, linear, batches, make_trainer, monkeypatch):
    """3 s of data to 1 s of step: the wait is three quarters, though each step also writes a checkpoint for 5 s."""
    clock = Clock()
    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", lambda *_, **__: clock.pass_(5.0))
    monkeypatch.setattr("medclip.callbacks.throughput.time.perf_counter", clock)
    checkpoint = LastCheckpoint(str(tmp_path), every_n_steps=1)
    trainer = make_trainer(Busy(clock), checkpoint, Throughput())
    trainer.fit(linear, batches(8, wait=lambda: clock.pass_(3.0)))
    metrics = trainer.callback_metrics
    assert metrics["speed/data_wait"] == pytest.approx(0.75)
    assert metrics["speed/samples_per_second"] == pytest.approx(3 / 4)
    assert metrics["data/skipped"] == 8


class Evaluates(pl.Callback):
    """As `OnlineEvaluation` tells of itself; 7 s after each step."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        for callback in trainer.callbacks:  # pyright: ignore
            if isinstance(callback, Throughput):
                callback.evaluating(trainer, pl_module)
        self.clock.pass_(7.0)


def test_evaluations_are_neither_step_nor_wait(tmp_path, linear, batches, make_trainer, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", lambda *_, **__: clock.pass_(5.0))
    monkeypatch.setattr("medclip.callbacks.throughput.time.perf_counter", clock)
    checkpoint = LastCheckpoint(str(tmp_path), every_n_steps=1)
    trainer = make_trainer(Busy(clock), Evaluates(clock), checkpoint, Throughput())
    trainer.fit(linear, batches(8, wait=lambda: clock.pass_(3.0)))
    assert trainer.callback_metrics["speed/data_wait"] == pytest.approx(0.75)
    assert trainer.callback_metrics["speed/samples_per_second"] == pytest.approx(3 / 4)


def test_what_is_saved_between_steps_is_not_taken_for_their_end(linear, monkeypatch):
    """A best checkpoint of a validation, saved before the next batch is fetched: 3 s of waiting, 1 s of step."""
    clock, trainer, throughput = Clock(), SimpleNamespace(world_size=1), Throughput()
    monkeypatch.setattr("medclip.callbacks.throughput.time.perf_counter", clock)
    monkeypatch.setattr(linear, "log_dict", lambda *_, **__: None)
    throughput.on_save_checkpoint(trainer, linear, {})
    clock.pass_(20.0)
    throughput.on_validation_end(trainer, linear)
    clock.pass_(3.0)
    throughput.on_train_batch_start(trainer, linear, {"key": ["a"]}, 0)
    clock.pass_(1.0)
    throughput.on_train_batch_end(trainer, linear, None, {"key": ["a"]}, 0)
    assert list(throughput.steps) == [(4.0, 3.0, 1)]


def test_vitals(linear, batches, make_trainer):
    """The rate that each step was taken with, though the schedule has moved on by the step's end; and this process."""

    def configure_optimizers():
        optimizer = torch.optim.SGD(linear.parameters(), lr=8.0)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), "interval": "step"}]

    class Keep(pl.Callback):
        def __init__(self) -> None:
            self.rates: list[float] = []

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            self.rates.append(float(trainer.callback_metrics["optim/lr"]))

    linear.configure_optimizers = configure_optimizers
    keep = Keep()
    trainer = make_trainer(Vitals(), keep)
    trainer.fit(linear, batches(4))
    assert keep.rates == [8.0, 4.0, 2.0, 1.0]
    held = float(trainer.callback_metrics["memory/rss_peak_gib"]) * 2**30
    status = Path("/proc/self/status").read_text().splitlines()  # the kernel's own name of it
    kernel = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    assert held == pytest.approx(kernel, rel=0.05)
    assert "memory/gpu_peak_gib" not in trainer.callback_metrics


def test_progress_line():
    trainer: Any = SimpleNamespace(
        global_step=25,
        estimated_stepping_batches=100,
        callback_metrics={
            "train/loss": torch.tensor(1.25),
            "speed/samples_per_second": torch.tensor(812.34),
            "speed/data_wait": torch.tensor(0.031),
            "data/skipped": torch.tensor(2.0),
        },
    )
    progress = Progress()
    progress._epoch = 1
    progress._first_step = 5  # resumed there: 20 steps in 40 s, so 75 more take 150 s
    expected = "epoch 2  step 25/100  loss 1.2500  812.3 samples/s  data wait 3%  2 skipped  0:02:30 left"
    assert progress.line(trainer, elapsed=40.0) == expected


def test_progress_prints_lines_off_a_terminal(linear, batches, make_trainer, capsys):
    make_trainer(Progress(seconds=0.0)).fit(linear, batches(3))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch")]
    assert [line.split("  ")[1] for line in lines] == ["step 1/3", "step 2/3", "step 3/3", "step 3/3"]
    assert "took" in lines[-1] and "\r" not in lines[-1]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_of_a_resumed_run_is_the_uninterrupted_one(tmp_path, make_trainer, linear, batches):
    make_trainer(logger=MetricsCsv(str(tmp_path / "whole"))).fit(linear, batches(6))
    whole = read(tmp_path / "whole" / "metrics.csv")
    assert [row["step"] for row in whole] == [str(step) for step in range(6)]

    path = tmp_path / "cut" / "metrics.csv"
    first = MetricsCsv(str(path.parent))
    for row in whole[:4]:
        first.log_metrics({"train/loss": float(row["train/loss"]), "epoch": int(row["epoch"])}, step=int(row["step"]))
    with path.open("a") as file:
        file.write("4,0.5")  # killed amid a row
    second = MetricsCsv(str(path.parent))  # resumed from the checkpoint of step 3
    for row in whole[3:]:
        second.log_metrics({"train/loss": float(row["train/loss"]), "epoch": int(row["epoch"])}, step=int(row["step"]))
    assert [(row["step"], row["train/loss"]) for row in read(path)] == [(r["step"], r["train/loss"]) for r in whole]


def test_csv_takes_new_columns(tmp_path):
    logger = MetricsCsv(str(tmp_path))
    logger.log_metrics({"a": 1.0}, step=0)
    logger.log_metrics({"b": 2.0}, step=1)
    assert read(logger.path) == [{"step": "0", "a": "1.0", "b": ""}, {"step": "1", "a": "", "b": "2.0"}]


class Kept(MetricsCsv):
    hyperparameters: dict[str, Any]

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.hyperparameters = params


def test_provenance(tmp_path, linear, batches, make_trainer, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    (tmp_path / "config.yaml").write_text("epochs: 3\nstorage: {token: '${oc.env:HF_TOKEN}', key: plain}\n")
    monkeypatch.setattr("sys.argv", ["medclip", "train", "data.storage.token=hf_very_secret", "epochs=3"])
    logger = Kept(str(tmp_path))
    make_trainer(Provenance(str(tmp_path)), logger=logger).fit(linear, batches(1))
    facts = json.loads((tmp_path / "provenance.json").read_text())
    assert facts["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert facts["command"] == ["medclip", "train", "data.storage.token=***", "epochs=3"]
    assert logger.hyperparameters["config"] == {"epochs": 3, "storage": {"token": "***", "key": "plain"}}
    assert "hf_very_secret" not in json.dumps(facts) + json.dumps(logger.hyperparameters)


def test_revision(tmp_path):
    assert revision(tmp_path) == {}
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    (tmp_path / "a").write_text("1")
    for words in (["init", "-q"], ["add", "a"], ["commit", "-q", "-m", "a"]):
        subprocess.run([*git, *words], check=True)
    clean = revision(tmp_path)
    assert len(clean["git_commit"]) == 40 and clean["git_changed"] is False
    (tmp_path / "a").write_text("2")
    assert revision(tmp_path) == {**clean, "git_changed": True}


def test_secrets():
    plain = {"tokenizer": "bpe", "api_key": "k", "nested": [{"password": "p", "keys": ["a"]}], "aws_secret": None}
    assert without_secrets(plain) == {
        "tokenizer": "bpe",
        "api_key": "***",
        "nested": [{"password": "***", "keys": ["a"]}],
        "aws_secret": None,
    }
    assert without_secrets("https://me:pw@host/x.tar") == "https://***@host/x.tar"


@pytest.mark.parametrize(
    ("mode", "key", "offline"),
    [(None, None, True), (None, "k", False), ("offline", "k", True), ("online", None, False), ("disabled", "k", True)],
)
def test_wandb_mode(tmp_path, monkeypatch, mode, key, offline):
    for name, value in {"WANDB_MODE": mode, "WANDB_API_KEY": key, "NETRC": str(tmp_path / "none")}.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert wandb.offline() is offline


def test_wandb_key_in_netrc(tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password k\n")
    (tmp_path / "netrc").chmod(0o600)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not wandb.offline()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert wandb.offline()


def test_wandb_run_is_continued(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    first, second = (wandb.wandb_logger(str(tmp_path), project="p", name="n") for _ in range(2))
    assert first.version == second.version and len(first.version) == 8
