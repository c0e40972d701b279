"""Training of a masked autoencoder: mask, encode what is left, draw the rest.

The model is a module `Batch -> NamedTuple` of tensors with a row a sample, which draws its masks from torch's
generator; that is seeded anew for each step, so that a resumed run masks what the uninterrupted one does.
"""

from __future__ import annotations

import torch

from medclip.tasks.base import real_rows
from medclip.tasks.rows import RowTask
from medclip.tasks.seed import seed_step
from medclip.types import Batch


class MaeTask(RowTask):
    """One step of it; see `Task` for the options."""

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        # The same masks each time, so that two values differ by what was learnt; and the training's draws stay its own.
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            seed_step(self.seed, 0, batch_idx, self.global_rank)
            _, terms, total = self.score(batch)
        self.log_validation(terms, total, real_rows(batch))
