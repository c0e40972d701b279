"""Training of a classifier of several findings at once, judged by the AUROC of each on the validation set.

The model is a module `Batch -> logits (b, c)`, whose `.description["classes"]` names the columns; `batch["label"]`
(b, c) is 0, 1, or NaN where unknown.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medclip.tasks.auroc import auroc_by_class
from medclip.tasks.balance import balance
from medclip.tasks.base import real_rows
from medclip.tasks.gather import count_real, gather_rows
from medclip.tasks.rows import RowTask
from medclip.types import Batch, UserError


class MultilabelTask(RowTask):
    """One step of it; see `Task` for the options.

    Validation logs `val/loss`, `val/auroc/CLASS`, and their mean `val/auroc` over the classes that have both values,
    by which the best checkpoint is chosen. Others are named once and left out.
    """

    weights_key = "model.init"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.classes: list[str] = list(self.model.description["classes"])  # pyright: ignore
        self._scores: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._named: tuple[str, ...] = ()

    def on_fit_start(self) -> None:
        """Tell the loss terms that ask for it how many samples have each class."""
        balance(self.losses.values(), self.classes, getattr(self.trainer, "datamodule", None))

    def score(self, batch: Batch) -> tuple[Any, dict[str, Tensor], Tensor]:
        label = batch.get("label")
        if label is None:
            raise UserError("the data have no labels: say data.labels, e.g. with data=cxr")
        if label.shape[1] != len(self.classes):
            raise UserError(
                f"the data have {label.shape[1]} labels a sample, the model {len(self.classes)} classes "
                f"({', '.join(self.classes[:3])}, …): data.labels and model.classes must name the same"
            )
        return super().score(batch)

    def on_validation_epoch_start(self) -> None:
        self._scores, self._labels = [], []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        logits, terms, total = self.score(batch)
        n = real_rows(batch)
        self.log_validation(terms, total, n)
        # Padded to the same number of rows on all ranks, as the loader hands them out.
        label = batch["label"]  # pyright: ignore[reportTypedDictNotRequiredAccess]
        padded = torch.zeros(label.shape, device=logits.device).index_copy_(
            0, torch.arange(n, device=logits.device), logits.float()
        )
        keep = count_real(n, logits.device)
        self._scores.append(gather_rows(padded, keep).cpu())
        self._labels.append(gather_rows(label, keep).cpu())

    def on_validation_epoch_end(self) -> None:
        scores, labels = (torch.cat(x).numpy() for x in (self._scores, self._labels))
        found = auroc_by_class(scores, labels, self.classes)
        left_out = tuple(name for name in self.classes if name not in found)
        if left_out and left_out != self._named and self.trainer.is_global_zero:
            self._named = left_out
            print(
                f"val/auroc leaves out {', '.join(left_out)}: the validation set has only one value of each",
                file=sys.stderr,
            )
        if not found:
            raise UserError(
                f"no class of the validation set ({len(labels)} samples) has both values: choose other data.val_sources"
            )
        # Gathered: every rank has the same values already.
        self.log_dict({f"val/auroc/{name}": value for name, value in found.items()})
        self.log("val/auroc", float(np.mean(list(found.values()))))
