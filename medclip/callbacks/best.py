"""The best checkpoint so far by a metric of the validation set, and validation once an epoch, which that needs.

The published code of the chest X-ray recipe (arXiv:2210.12843) evaluates on the test set every ten epochs and reports
the best of these. Here only the validation set chooses; the test set is for `medclip evaluate`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint

from medclip.types import UserError


class BestCheckpoint(ModelCheckpoint):
    """One file, `dirpath/best.ckpt`, replaced when a validation is better than all before it.

    Args:
        dirpath: folder of the checkpoints.
        monitor: a metric that validation logs.
        mode: whether more of it is better, or less.
    """

    def __init__(self, dirpath: str, monitor: str = "val/auroc", mode: Literal["min", "max"] = "max") -> None:
        super().__init__(
            dirpath=dirpath,
            filename="best",
            monitor=monitor,
            mode=mode,
            save_top_k=1,
            save_on_train_epoch_end=False,  # Lightning's epoch is the whole run
            enable_version_counter=False,
            auto_insert_metric_name=False,
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if not trainer.val_dataloaders:
            raise UserError(
                "data.val_sources is empty, so that no best checkpoint can be chosen: name a validation set (never the "
                "test set), or leave the callback out: callbacks=[default]"
            )
        if self.best_model_score is None and trainer.is_global_zero:
            assert self.dirpath is not None
            (Path(self.dirpath) / "best.ckpt").unlink(missing_ok=True)  # of a run that this one overwrites


class ValidateByEpoch(pl.Callback):
    """Validates after every `every` passes over the data.

    To Lightning a run is one epoch, whatever passes its stream has. A run that `max_steps` ends within its first pass
    is validated at its end.

    Args:
        epochs: passes of the whole run.
        every: passes between two validations.
    """

    def __init__(self, epochs: int, every: int = 1) -> None:
        if every < 1:
            raise UserError(f"callbacks.validation.every is {every}: give 1 or more passes over the data")
        self.epochs = epochs
        self.every = every

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        batches = max(1, round(trainer.num_training_batches / self.epochs) * self.every)
        if trainer.max_steps > 0:
            batches = min(batches, trainer.max_steps * trainer.accumulate_grad_batches)
        trainer.val_check_batch = batches
