"""A trainer's smallest honest company: a linear model on keyed batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from medclip.callbacks.storage import AtomicCheckpointIO


class Linear(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 1)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        loss = self.layer(batch["text"].float()).square().mean()
        self.log("train/loss", loss, batch_size=1)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Batches:
    """`count` batches of four rows, one of them for a skipped sample; `wait` is called before each is handed out."""

    def __init__(self, count: int, wait: Callable[[], None] = lambda: None) -> None:
        self.count, self.wait = count, wait

    def __len__(self) -> int:
        return self.count

    def __iter__(self):
        for number in range(self.count):
            self.wait()
            yield {"text": torch.full((4, 3), number), "key": [f"{number}-{row}" for row in range(3)], "skipped": 1}


@pytest.fixture
def linear() -> Linear:
    return Linear()


@pytest.fixture
def batches() -> type[Batches]:
    return Batches


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., pl.Trainer]:
    def make(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        if not any(isinstance(callback, pl.callbacks.ModelCheckpoint) for callback in callbacks):
            quiet["enable_checkpointing"] = any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks)
        options = {"max_epochs": 1, "log_every_n_steps": 1, **quiet, **options}
        plugins = [AtomicCheckpointIO()]
        return pl.Trainer(
            accelerator="cpu", default_root_dir=tmp_path, callbacks=list(callbacks), plugins=plugins, **options
        )

    return make
