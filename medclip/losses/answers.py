"""Losses of answers that are chosen: binary cross entropy of each (MEVF, QCR), cross entropy among them, and of types.

With b(i, a) the binary cross entropy of row i's logit of answer a, and I the rows that go through a branch of answers
A (one branch of all rows and answers, unless the model has more):

    loss = sum over branches of 1/|I| sum_{i in I} sum_{a in A} b(i, a)

(reduction: sum, as MEVF, arXiv:1909.11867), or with 1/|A| before the inner sum (reduction: mean, as QCR: L = L_closed +
L_open). A branch without rows adds 0.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from medclip.types import Batch, UserError


@runtime_checkable
class Answers(Protocol):
    """What a model that answers returns, as far as these losses go; `own` marks the logits of a row's own branch."""

    @property
    def logits(self) -> Float[Tensor, "n answers"]: ...

    @property
    def own(self) -> Bool[Tensor, "n answers"]: ...

    @property
    def closed(self) -> Float[Tensor, " n"]: ...  # log-odds of "closed"; NaN: nothing to learn


def answers_loss(
    logits: Float[Tensor, "n answers"],
    label: Float[Tensor, "n answers"],
    own: Bool[Tensor, "n answers"],
    reduction: str,
) -> Float[Tensor, ""]:
    """Sum over branches of the mean over their rows. Labels are 0 or 1."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    terms = F.binary_cross_entropy_with_logits(logits, label.to(logits.dtype), reduction="none")
    # An answer is in one branch, which as many rows take as own it; a row has as many answers as its branch.
    share = own / own.sum(0).clamp(min=1)
    if reduction == "mean":
        share = share / own.sum(1, keepdim=True).clamp(min=1)
    return torch.where(own, terms, 0.0).mul(share).sum()


class AnswersLoss(nn.Module):
    """`answers_loss` as a loss term.

    Args:
        reduction: over the answers of a branch: "sum" or "mean".
    """

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        if reduction not in ("sum", "mean"):
            raise UserError(f"loss answers: reduction is {reduction!r}: choose sum or mean")
        self.reduction = reduction

    def forward(self, out: Answers, batch: Batch) -> Float[Tensor, ""]:
        return answers_loss(out.logits, right_answers(batch), out.own, self.reduction)


class ChoiceLoss(nn.Module):
    """Cross entropy of the right answer among those of its branch; rows whose right answer is not known are left out.

    Args:
        smoothing: share of the target that is spread over all answers of the branch.
    """

    def __init__(self, smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= smoothing < 1:
            raise UserError(f"loss choice: smoothing is {smoothing}: give a share from 0 to below 1")
        self.smoothing = smoothing

    def forward(self, out: Answers, batch: Batch) -> Float[Tensor, ""]:
        label = right_answers(batch) * out.own
        known = label.sum(1) > 0
        logits = out.logits.to(torch.promote_types(out.logits.dtype, torch.float32))
        share = out.own / out.own.sum(1, keepdim=True).clamp(min=1)
        target = (1 - self.smoothing) * label / label.sum(1, keepdim=True).clamp(min=1) + self.smoothing * share
        # What is not own has a target of 0, and must not turn that into 0 * -inf.
        among = logits.masked_fill(~out.own & known[:, None], -torch.inf).log_softmax(1)
        terms = -torch.where(out.own, among * target, 0.0).sum(1)
        return torch.where(known, terms, 0.0).sum() / known.sum().clamp(min=1)


class TypesLoss(nn.Module):
    """Cross entropy of closed or open by the model's router, where it is trained beside the answers; else 0."""

    def forward(self, out: Answers, batch: Batch) -> Float[Tensor, ""]:
        known = out.closed.isfinite() & out.own.any(1)
        terms = F.binary_cross_entropy_with_logits(
            torch.where(known, out.closed, 0.0).float(), out.own[:, 0].float(), reduction="none"
        )
        return torch.where(known, terms, 0.0).sum() / known.sum().clamp(min=1)


def right_answers(batch: Batch) -> Float[Tensor, "n answers"]:
    """`batch["label"]`.

    Raises:
        UserError: there is none.
    """
    label = batch.get("label")
    if label is None:
        raise UserError("the data have no answers: say data.labels (names, field: vqa.slot; see conf/data/vqa.yaml)")
    return label
