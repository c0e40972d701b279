"""Small models, numbered batches and a trainer for the tasks whose loss is a mean over samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from medclip.callbacks.storage import AtomicCheckpointIO
from medclip.losses.bce import BceLoss
from medclip.losses.mae import MaeLoss
from medclip.models.mae import build_mae
from medclip.models.vit import build_vit
from medclip.optim.adamw import adamw
from medclip.optim.schedule import warmup_cosine
from medclip.tasks.mae import MaeTask
from medclip.tasks.multilabel import MultilabelTask

SIZE: dict[str, Any] = {"image_size": 32, "patch_size": 8, "dim": 32, "depth": 2, "heads": 2}
DECODER: dict[str, Any] = {"decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 2}
CLASSES = ["Effusion", "Hernia", "Mass"]


def parts(lr: float) -> dict[str, Any]:
    return {
        "optimizer": lambda named: adamw(named, lr=lr, weight_decay=0.05),
        "schedule": lambda optimizer, total: warmup_cosine(optimizer, total, warmup=2),
    }


def mae_task(mask_ratio: float = 0.75, lr: float = 3e-3, **options: Any) -> MaeTask:
    torch.manual_seed(0)
    model = build_mae(**SIZE, **DECODER, mask_ratio=mask_ratio)
    return MaeTask(model, {"reconstruction": MaeLoss()}, **parts(lr), **options)


def multilabel_task(lr: float = 3e-3, drop_path: float = 0.5, **options: Any) -> MultilabelTask:
    torch.manual_seed(0)
    model = build_vit(CLASSES, **SIZE, drop_path=drop_path)
    return MultilabelTask(model, {"bce": BceLoss()}, **parts(lr), **options)


def batch(number: int, n: int = 6, rows: int = 6) -> dict[str, Any]:
    """`n` samples, padded to `rows`: a bright square for each finding that is there, and some unknown labels."""
    generator = torch.Generator().manual_seed(number)
    image = torch.randint(0, 60, (rows, 3, 32, 32), dtype=torch.uint8, generator=generator)
    label = torch.randint(0, 2, (rows, 3), generator=generator).float()
    for row, column in label.nonzero().tolist():
        image[row, :, 10 * column : 10 * column + 8, 4:28] += 150
    label[0, 1] = torch.nan
    image[n:], label[n:] = 0, 0
    keys = [f"{number}-{row}" for row in range(n)]
    return {"image": image, "label": label, "key": keys, "epoch": number // 3, "skipped": 0}


class Stream(pl.LightningDataModule):
    """Numbered batches whose position is in the checkpoint, as the real data module's is."""

    def __init__(self, batches: list[dict[str, Any]], val: list[dict[str, Any]] | None = None) -> None:
        super().__init__()
        self.batches, self.val, self.position, self.batch_size = batches, val, 0, 6

    def train_dataloader(self) -> Stream:
        return self

    def val_dataloader(self) -> list[Any]:
        return [Loader(self.val)] if self.val else []

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.position = state_dict["position"]


class Loader:
    def __init__(self, batches: list[dict[str, Any]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


class Losses(pl.Callback):
    """The exact loss of each step."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        self.seen.append(float(outputs["loss"]).hex())


class SaveAndDie(pl.Callback):
    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise SystemExit


def trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    quiet["enable_checkpointing"] = any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks)
    options = {"max_epochs": 1, "logger": False, "num_sanity_val_steps": 0, **quiet, **options}
    return pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        plugins=[AtomicCheckpointIO()],
        log_every_n_steps=1,
        **options,
    )
