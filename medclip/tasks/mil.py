"""Training of a model of slides from bags of features, judged by what its outputs mean on the validation set.

The model is a module `Batch -> output` with a row a bag (`logits`, and `extra`: losses of the head's own, which
`model.extra_names` names), whose `.description` says `target` and `classes`. What is known of a bag is in
`batch["label"]`, and in `time` and `event` for survival.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from medclip.tasks.balance import balance
from medclip.tasks.base import real_rows
from medclip.tasks.gather import count_real, gather_rows
from medclip.tasks.mil_metrics import classes_metrics, multilabel_metrics, ordinal_metrics, survival_metrics
from medclip.tasks.rows import RowTask
from medclip.types import Batch, UserError

_UNDEFINED = {  # target -> what validation needs for its metric
    "classes": "auroc", "ordinal": "kappa", "multilabel": "auroc", "survival": "cindex",
}  # fmt: skip


class MilTask(RowTask):
    """One step of it; see `Task` for the options.

    Validation logs `val/loss`, and over all bags of all ranks: `val/auroc` (macro), `val/balanced_accuracy` and
    `val/accuracy` of classes; `val/kappa` (quadratic) and `val/balanced_accuracy` of grades; `val/auroc` of findings;
    `val/cindex` of survival.
    """

    weights_key = "model.init"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        about: Any = self.model.description
        self.target = str(about["target"])
        self.classes: list[str] = list(about["classes"])
        self.extra_names: list[str] = list(getattr(self.model, "extra_names", ()))
        self._seen: list[Tensor] = []

    def on_fit_start(self) -> None:
        """Look whether the losses suit the data, and tell those that ask for it how many slides each class has.

        Raises:
            UserError: a loss that compares bags with each other, and one bag a batch.
        """
        data = getattr(self.trainer, "datamodule", None)
        size = getattr(data, "batch_size", None)
        for name, term in self.losses.items():
            if getattr(term, "compares_bags", False) and size == 1:
                raise UserError(
                    f"loss {name} compares the slides of a batch with each other, and data.batch_size is 1: say "
                    "data.batch_size=16 data.patches=4096, or take loss=[survival] with intervals of time"
                )
        balance(self.losses.values(), self.classes, data)

    def score(self, batch: Batch) -> tuple[Any, dict[str, Tensor], Tensor]:
        out, terms, total = super().score(batch)
        if terms:  # each of the head's own losses beside their weighted sum
            terms = terms | {name: out.extra[:, i].float().mean() for i, name in enumerate(self.extra_names)}
        return out, terms, total

    def on_validation_epoch_start(self) -> None:
        self._seen = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        out, terms, total = self.score(batch)
        n = real_rows(batch)
        self.log_validation(terms, total, n)
        truth = batch.get("label")
        if self.target == "survival":
            truth = torch.stack([batch["time"], batch["event"]], 1)  # pyright: ignore[reportTypedDictNotRequiredAccess]
        assert truth is not None  # else there was no loss
        # Padded to the same number of rows on all ranks, as the loader hands them out.
        own = torch.cat([out.logits.float(), truth[:n].float()], 1)
        padded = own.new_zeros(len(truth), own.shape[1])
        padded[:n] = own
        self._seen.append(gather_rows(padded, count_real(n, own.device)).cpu())

    def on_validation_epoch_end(self) -> None:
        seen = torch.cat(self._seen).double() if self._seen else torch.empty(0, 0)
        outputs = seen.shape[1] - 2 if self.target == "survival" else seen.shape[1] // 2
        logits, truth = seen[:, :outputs].numpy(), seen[:, outputs:].numpy()
        known = truth == truth
        rows = known.any(1) if self.target == "multilabel" else known.all(1)
        logits, truth = logits[rows], truth[rows]
        found: dict[str, float] = {}
        if len(logits):
            if self.target == "survival":
                found = survival_metrics(logits, truth[:, 0], truth[:, 1])
            elif self.target == "ordinal":
                found = ordinal_metrics(logits, truth)
            else:
                measure = classes_metrics if self.target == "classes" else multilabel_metrics
                found = measure(logits, truth, self.classes)
        if _UNDEFINED[self.target] not in found:
            why = "no two slides can be compared" if self.target == "survival" else "they are all of one class"
            raise UserError(
                f"the validation set ({len(logits)} slides with a label) has no {_UNDEFINED[self.target]}: {why}; "
                "take more slides, fewer data.folds, or another split"
            )
        # Gathered: every rank has the same values already.
        self.log_dict({f"val/{name}": value for name, value in found.items()})
