"""SIGTERM and Ctrl-C end a run, not its work: the step is finished, `last.ckpt` saved, the process exits.

Exit status 143 after SIGTERM and 130 after Ctrl-C, as a shell expects of a program that a signal ended; a second Ctrl-C
(or SIGTERM) stops at once, without saving. Under DDP a signal to any one rank stops all of them after the same step.

Within a SLURM job SIGUSR1 does the same and has the job queued again (`sbatch --requeue --signal=USR1@120`), where it
goes on with resume=auto. It is taken from Lightning, which would save amid a step, whenever the signal comes, into a
checkpoint of its own, each rank at another step.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint

SIGNALS = (signal.SIGTERM, signal.SIGINT)
REQUEUE = signal.SIGUSR1


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
            numbers = (*SIGNALS, REQUEUE) if slurm_job() else SIGNALS
            self._before = {number: signal.signal(number, self._receive) for number in numbers}

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
        again = trainer.strategy.reduce_boolean_decision(self.received == REQUEUE, all=False)
        reason = REQUEUE if again else self.received or signal.SIGTERM
        if trainer.is_global_zero:
            print(
                f"\n{reason.name}: stopped after step {trainer.global_step}, saved {self.path}; go on with resume=auto",
                file=sys.stderr,
                flush=True,
            )
            if again:
                requeue(slurm_job())
        raise SystemExit(128 + reason)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if number == REQUEUE:  # SLURM may say it to the job and to its steps
                return
            raise SystemExit(128 + number)
        self.received = signal.Signals(number)
        print(
            f"\n{self.received.name}: finishing the step and saving (once more to stop at once, without saving)",
            file=sys.stderr,
            flush=True,
        )


def slurm_job() -> str:
    """The batch job that this process belongs to, as `scontrol` calls it; "" outside of one and at a terminal in it."""
    if os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return ""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '0')}"
    return os.environ.get("SLURM_JOB_ID", "")


def requeue(job: str) -> None:
    """Have SLURM start the job again; it ends this one with it. Where it cannot, say so and end all the same."""
    try:
        answer = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        failed = (answer.stderr.strip() or f"status {answer.returncode}") if answer.returncode else ""
    except OSError as error:
        failed = str(error)
    said = f"could not be queued again ({failed}): submit it once more" if failed else "is queued again"
    print(f"job {job} {said}", file=sys.stderr, flush=True)
