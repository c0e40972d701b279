"""SIGTERM and Ctrl-C end a run, not its work: the step is finished, `last.ckpt` saved, the process exits.

Exit status 143 after SIGTERM and 130 after Ctrl-C, as a shell expects of a program that a signal ended; a second Ctrl-C
(or SIGTERM) stops at once, without saving. Under DDP a signal to any one rank stops all of them after the same step.
SLURM's SIGUSR1 (requeue) stays with Lightning.
"""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class GracefulStop(Checkpoint):
    """Save to `path` and exit after the step in which a signal came.

    A `Checkpoint` because Lightning runs those last at a step's end: the others have recorded the step by then.

    Args:
        path: the checkpoint that `resume=auto` goes on from.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # From here on in place of Lightning's own handler, which would start a collective inside the handler.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Amid an accumulation the gradients so far would be lost: go on to the optimiser's step.
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            return
        # Every rank asks at every step, so that all stop at the same one (Lightning synchronises as often itself).
        if not trainer.strategy.reduce_boolean_decision(self.received is not None, all=False):
            return
        trainer.save_checkpoint(self.path)
        reason = self.received or signal.SIGTERM
        if trainer.is_global_zero:
            print(
                f"\n{reason.name}: stopped after step {trainer.global_step}, saved {self.path}; go on with resume=auto",
                file=sys.stderr,
                flush=True,
            )
        raise SystemExit(128 + reason)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise SystemExit(128 + number)
        self.received = signal.Signals(number)
        print(
            f"\n{self.received.name}: finishing the step and saving (once more to stop at once, without saving)",
            file=sys.stderr,
            flush=True,
        )
