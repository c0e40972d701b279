"""How fast a run goes, and whether it waits for its data: `speed/*` and `data/skipped` among the metrics."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint


class Throughput(Checkpoint):
    """Logs, over the last `window` steps:

    - `speed/samples_per_second`: real samples of all ranks by wall time, without validation, evaluations and saving;
    - `speed/data_wait`: share of that time between the end of a step and the arrival of the next batch on the device.
      The clock is the host's: on a GPU, which works on meanwhile, it is an upper bound of the GPU's own waiting;
    - `data/skipped`: unusable samples so far, all ranks taken as alike.

    A `Checkpoint` only because Lightning runs those last at a step's end: what writing one or an evaluation costs is
    neither step nor wait.
    """

    def __init__(self, window: int = 50) -> None:
        self.steps: deque[tuple[float, float, int]] = deque(maxlen=window)  # seconds, of them waiting, samples
        self.skipped = 0
        self._ended = self._arrived = 0.0
        self._paused: float | None = None  # since when a step that is over is evaluated or saved

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ended = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ended = time.perf_counter()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._arrived = time.perf_counter()
        self._paused = None
        # On arrival, so that a checkpoint of this very step knows of them.
        self.skipped += batch.get("skipped", 0) * trainer.world_size

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.evaluating(trainer, pl_module)

    def evaluating(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        """Told by `OnlineEvaluation`, before it begins."""
        if self._paused is None:
            self._paused = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = self._paused or time.perf_counter()
        real = len(batch["key"])
        self.steps.append((now - self._ended, self._arrived - self._ended, real * trainer.world_size))
        seconds, waiting, samples = (sum(column) for column in zip(*self.steps, strict=True))
        pl_module.log_dict(
            {
                "speed/samples_per_second": samples / seconds,
                "speed/data_wait": waiting / seconds,
                "data/skipped": float(self.skipped),
            },
            batch_size=1,
        )
        self._ended = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]
