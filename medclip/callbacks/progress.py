"""One line that says how far a run is: rewritten in place on a terminal, a new one now and then in a log file."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl

PARTS = (  # metric, how it is shown
    ("train/loss", "loss {:.4f}"),
    ("speed/samples_per_second", "{:.1f} samples/s"),
    ("speed/data_wait", "data wait {:.0%}"),
    ("data/skipped", "{:.0f} skipped"),
)


class Progress(pl.Callback):
    """Prints the step, the loss, the rate, the wait for data, the samples skipped, and the time left.

    Args:
        seconds: between lines where the output is no terminal; on one, the line is renewed twice a second.
    """

    def __init__(self, seconds: float = 30.0) -> None:
        self.live = sys.stderr.isatty()
        self.seconds = 0.5 if self.live else seconds
        self._shown = self._started = -math.inf
        self._first_step = 0
        self._epoch = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.monotonic()
        self._first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._epoch = batch.get("epoch", trainer.current_epoch)  # the stream's; to Lightning a streamed run is one
        now = time.monotonic()
        if trainer.is_global_zero and now - self._shown >= self.seconds:
            self._shown = now
            self._show(self.line(trainer, now - self._started))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and "val/loss" in trainer.callback_metrics:
            self._show(f"step {trainer.global_step}  val loss {trainer.callback_metrics['val/loss']:.4f}", end=True)

    def evaluated(
        self,
        trainer: pl.Trainer,
        task: pl.LightningModule,
        metrics: Mapping[str, float],
        results: Any,
        *,
        started: bool,
    ) -> None:
        """Told by `online.OnlineEvaluation`."""
        if trainer.is_global_zero:
            words = [f"{name} {result.metrics[result.headline[0]]:.3f}" for name, result in results.items()]
            if "eval/score" in metrics:
                words.append(f"score {metrics['eval/score']:.3f}")
            self._show("  ".join([f"step {trainer.global_step}  evaluated:", *words]), end=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero and trainer.global_step > self._first_step:
            took = timedelta(seconds=round(time.monotonic() - self._started))
            self._show(f"{self.line(trainer, time.monotonic() - self._started)}  took {took}", end=True)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Of a run that is complete, Lightning says nothing.
        idle = self._started == -math.inf or trainer.global_step == self._first_step
        if trainer.is_global_zero and trainer.ckpt_path and idle:
            print(
                f"nothing left to train: {trainer.ckpt_path} is the end of its run, step {trainer.global_step}; to "
                "train longer, start a new run from it with model=local model.pretrained=CHECKPOINT",
                file=sys.stderr,
                flush=True,
            )

    def line(self, trainer: pl.Trainer, elapsed: float) -> str:
        """The line for the trainer's present state, `elapsed` seconds after this process began to train."""
        step, total = trainer.global_step, trainer.estimated_stepping_batches
        words = [f"epoch {self._epoch + 1}", f"step {step}/{total:.0f}"]
        metrics = trainer.callback_metrics
        words += [form.format(float(metrics[name])) for name, form in PARTS if name in metrics]
        done = step - self._first_step
        if done > 0 and step < total < math.inf:
            words.append(f"{timedelta(seconds=round(elapsed / done * (total - step)))} left")
        return "  ".join(words)

    def _show(self, line: str, *, end: bool = False) -> None:
        # \r and "erase to the end of the line" keep it one line.
        text = f"\r{line}\x1b[K" if self.live else line
        print(text, end="" if self.live and not end else "\n", file=sys.stderr, flush=True)
