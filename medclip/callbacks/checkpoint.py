"""The checkpoint that a run goes on from: `last.ckpt`, every n optimiser steps and at the end."""

from __future__ import annotations

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint


class LastCheckpoint(ModelCheckpoint):
    """One file, `dirpath/last.ckpt`, replaced every `every_n_steps` optimiser steps and when training ends.

    Where Lightning's own differs: it keeps a second copy under the step's name, does not save the end of a run whose
    length is no multiple of n, and just after a resume may save amid an accumulation of gradients, which would be lost.
    """

    def __init__(self, dirpath: str, every_n_steps: int = 500) -> None:
        super().__init__(
            dirpath=dirpath,
            every_n_train_steps=every_n_steps,
            save_last=True,
            save_top_k=0,
            enable_version_counter=False,
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
