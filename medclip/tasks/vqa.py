"""Training of a model that chooses answers to questions about images, judged by its accuracy on the validation set.

The model is a module `Batch -> output` with a row a sample, whose `.description["answers"]` names the columns of
`batch["label"]` (b, answers), and whose `.answer(batch)` gives scores as a test would see them: a question may have
been led to the wrong branch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from medclip.tasks.base import real_rows
from medclip.tasks.rows import RowTask
from medclip.types import CLOSED, Batch, UserError

_COUNTED = ("accuracy", "accuracy/closed", "accuracy/open", "routing")


class VqaTask(RowTask):
    """One step of it; see `Task` for the options.

    Validation logs `val/loss`, and `val/accuracy` over all questions, by which the best checkpoint is chosen. Where the
    answers say which of them are closed, `val/accuracy/closed` and `/open` are by the type of the right answer, and
    `val/routing` is how often the model told it, where it tells types. A right answer that the model does not have
    makes its question wrong, and of no type.
    """

    weights_key = "model.visual.pretrained"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        answers: list[str] = list(self.model.description["answers"])  # pyright: ignore
        self.answers = len(answers)
        self.closed = sum(name.startswith(CLOSED) for name in answers)
        self._counts = torch.zeros(len(_COUNTED), 2, dtype=torch.float64)

    def score(self, batch: Batch) -> tuple[Any, dict[str, Tensor], Tensor]:
        label = batch.get("label")
        if label is None:
            raise UserError(
                "the data have no answers: say data.labels (names, field: vqa.slot; see conf/data/vqa.yaml)"
            )
        if label.shape[1] != self.answers:
            raise UserError(
                f"the data have {label.shape[1]} answers, the model {self.answers}: model.answers must be "
                "${data.labels.names}"
            )
        return super().score(batch)

    def on_validation_epoch_start(self) -> None:
        self._counts = torch.zeros_like(self._counts)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        _, terms, total = self.score(batch)
        n = real_rows(batch)
        self.log_validation(terms, total, n)
        found = self.model.answer(batch)  # pyright: ignore[reportCallIssue]
        right = batch["label"][:n] == 1  # pyright: ignore[reportTypedDictNotRequiredAccess]
        self._counts += counted(found.scores[:n], found.closed[:n], right, self.closed).cpu()

    def on_validation_epoch_end(self) -> None:
        counts = self._counts.to(self.device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
        if not counts[0, 1]:
            raise UserError("the validation set has no question that could be read: choose other data.val_sources")
        for name, (right, of) in zip(_COUNTED, counts.tolist(), strict=True):
            if of:
                self.log(f"val/{name}", right / of)


def counted(scores: Tensor, told: Tensor, right: Tensor, closed: int) -> Tensor:
    """(right, of) of each of `_COUNTED`, float64 (4, 2).

    Args:
        scores: (n, answers); a row of -inf alone is none of them.
        told: (n,) probability that a question is closed; NaN where the model does not tell.
        right: bool (n, answers).
        closed: how many of the answers are closed ones; 0 where they do not say.
    """
    hit = right.gather(1, scores.argmax(1, keepdim=True)).squeeze(1) & (scores.amax(1) > -torch.inf)
    is_closed, is_open = right[:, :closed].any(1), right[:, closed:].any(1)
    typed = is_closed | is_open if closed else torch.zeros_like(hit)
    routed = typed & told.isfinite()
    pairs = [
        (hit, torch.ones_like(hit)),
        (hit, typed & is_closed),
        (hit, typed & is_open),
        ((told >= 0.5) == is_closed, routed),
    ]
    return torch.stack([torch.stack([(good & of).sum(), of.sum()]) for good, of in pairs]).double()
