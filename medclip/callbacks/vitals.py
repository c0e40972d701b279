"""Learning rate and memory among the metrics: `optim/lr`, `memory/gpu_peak_gib`, `memory/rss_peak_gib`."""

from __future__ import annotations

import resource
import sys
from typing import Any

import pytorch_lightning as pl
import torch

GIB = 2**30


class Vitals(pl.Callback):
    """Logs, with each step:

    - `optim/lr`: the learning rate that the step was taken with, the largest of all parameter groups (under layer-wise
      rates that of the head);
    - `memory/gpu_peak_gib`: the most that torch's tensors took on rank 0's GPU since the start, GiB; on GPUs only;
    - `memory/rss_peak_gib`: the most that rank 0's process took of the machine's memory, its reader processes left out.
    """

    def __init__(self) -> None:
        self._lr = 0.0

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._lr = max(group["lr"] for group in optimizer.param_groups)  # the scheduler moves on before the step's end

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        found = {"optim/lr": self._lr, "memory/rss_peak_gib": rss_peak() / GIB}
        if pl_module.device.type == "cuda":
            found["memory/gpu_peak_gib"] = torch.cuda.max_memory_allocated(pl_module.device) / GIB
        pl_module.log_dict(found, batch_size=1)


def rss_peak() -> int:
    """The most memory that this process has held, in bytes (getrusage counts KiB, on macOS bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
