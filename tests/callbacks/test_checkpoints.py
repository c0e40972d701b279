"""`last.ckpt`: whole or not there, written when it should be, and saved when a signal ends the run."""

from __future__ import annotations

import os
import pickle
import signal
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from medclip.callbacks.checkpoint import LastCheckpoint
from medclip.callbacks.graceful import GracefulStop
from medclip.callbacks.storage import AtomicCheckpointIO
from medclip.types import UserError

VERSION = {"pytorch-lightning_version": pl.__version__}


class Refuses:
    """Cannot be saved, as a full disk would not."""

    def __reduce__(self) -> Any:
        raise OSError(28, "No space left on device")


class Opens:
    """Would run code when unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("exit 1",)


def test_failed_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "deep" / "last.ckpt"
    io = AtomicCheckpointIO()
    io.save_checkpoint({"state_dict": {"w": torch.ones(3)}, **VERSION}, path)
    with pytest.raises(UserError, match=r"last\.ckpt.*No space left"):
        io.save_checkpoint({"state_dict": {"w": torch.zeros(100_000), "x": Refuses()}}, path)
    assert torch.equal(io.load_checkpoint(path)["state_dict"]["w"], torch.ones(3))
    assert [entry.name for entry in path.parent.iterdir()] == ["last.ckpt"]


def test_the_good_name_never_holds_half_a_file(tmp_path, monkeypatch):
    """Killed between write and rename: the old file stands; the next save clears up."""
    path = tmp_path / "last.ckpt"
    io = AtomicCheckpointIO()
    io.save_checkpoint({"state_dict": {"step": 1}, **VERSION}, path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            io.save_checkpoint({"state_dict": {"step": 2}}, path)
    assert io.load_checkpoint(path)["state_dict"] == {"step": 1}
    io.save_checkpoint({"state_dict": {"step": 3}, **VERSION}, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("kind", ["missing", "cut", "code", "text", "other", "weights"])
def test_unreadable_checkpoints_are_one_line(tmp_path, kind):
    path = tmp_path / "last.ckpt"
    io = AtomicCheckpointIO()
    if kind == "cut":
        io.save_checkpoint({"state_dict": {"w": torch.ones(1000)}}, path)
        path.write_bytes(path.read_bytes()[:-700])
    if kind == "code":
        path.write_bytes(pickle.dumps({"state_dict": Opens()}))
    if kind == "text":
        path.write_text("hello\n")
    if kind == "weights":  # as open_clip's training saves them
        torch.save({"epoch": 1, "state_dict": {"w": torch.ones(1)}}, path)
    if kind == "other":
        torch.save({"weights": torch.ones(1)}, path)
    with pytest.raises(UserError, match=r"last\.ckpt") as error:
        io.load_checkpoint(path, weights_only=False)
    assert "\n" not in str(error.value)


class Watch(pl.Callback):
    """Which steps a checkpoint was written at."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_save_checkpoint(self, trainer: pl.Trainer, *_: Any) -> None:
        self.steps.append(trainer.global_step)


def test_every_n_steps_and_at_the_end(tmp_path, linear, batches, make_trainer):
    watch = Watch()
    make_trainer(LastCheckpoint(str(tmp_path / "c"), every_n_steps=4), watch).fit(linear, batches(10))
    assert watch.steps == [4, 8, 10]
    assert [entry.name for entry in (tmp_path / "c").iterdir()] == ["last.ckpt"]
    saved = torch.load(tmp_path / "c" / "last.ckpt", weights_only=True)
    assert torch.equal(saved["state_dict"]["layer.weight"], linear.layer.weight)


def test_accumulation_is_never_cut(tmp_path, linear, batches, make_trainer):
    """Two batches a step: neither the first run nor the resumed one saves with half a step's gradients pending."""
    pending: list[bool] = []

    class Pending(pl.Callback):
        def on_save_checkpoint(self, trainer: pl.Trainer, *_: Any) -> None:
            pending.append(trainer.fit_loop._should_accumulate())

    def callbacks() -> list[pl.Callback]:
        return [LastCheckpoint(str(tmp_path), every_n_steps=2), Pending()]

    make_trainer(*callbacks(), accumulate_grad_batches=2).fit(linear, batches(4))
    last = str(tmp_path / "last.ckpt")
    make_trainer(*callbacks(), accumulate_grad_batches=2, max_epochs=2).fit(linear, batches(4), ckpt_path=last)
    assert len(pending) >= 2 and not any(pending)
    assert torch.load(last, weights_only=True)["global_step"] == 4


class Send(pl.Callback):
    """Signals this process while it works on a batch."""

    def __init__(self, number: signal.Signals, batch: int, times: int = 1) -> None:
        self.number, self.batch, self.times = number, batch, times

    def on_before_zero_grad(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.fit_loop.batch_idx == self.batch:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_finishes_the_step_saves_and_exits(tmp_path, linear, batches, make_trainer, capsys, number, status):
    path = tmp_path / "last.ckpt"
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as exit_:
        make_trainer(GracefulStop(str(path)), Send(number, batch=2)).fit(linear, batches(10))
    assert exit_.value.code == status
    saved = torch.load(path, weights_only=True)
    assert saved["global_step"] == 3
    assert torch.equal(saved["state_dict"]["layer.weight"], linear.layer.weight)
    assert signal.getsignal(number) is before
    lines = capsys.readouterr().err
    assert f"{number.name}: stopped after step 3, saved {path}" in lines and "resume=auto" in lines

    make_trainer().fit(linear, batches(10), ckpt_path=str(path))
    assert linear.trainer.global_step == 10


def test_signal_waits_for_the_accumulated_step(tmp_path, linear, batches, make_trainer):
    path = tmp_path / "last.ckpt"
    with pytest.raises(SystemExit):
        stop = GracefulStop(str(path))
        make_trainer(stop, Send(signal.SIGTERM, batch=4), accumulate_grad_batches=4).fit(linear, batches(10))
    saved = torch.load(path, weights_only=True)
    assert (saved["global_step"], saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"]) == (2, 8)


def test_second_signal_stops_at_once(tmp_path, linear, batches, make_trainer):
    path = Path(tmp_path / "last.ckpt")
    with pytest.raises(SystemExit) as exit_:
        make_trainer(GracefulStop(str(path)), Send(signal.SIGINT, batch=1, times=2)).fit(linear, batches(10))
    assert exit_.value.code == 130
    assert not path.exists()
