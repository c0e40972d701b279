"""Several findings at once: binary cross entropy of each, unknown labels left out.

With p = sigmoid(logit), y in {0, 1}, K the known entries of the (samples x classes) labels and w the classes' weights:

    loss = -1/|K| * sum_{(i, c) in K} w_c y_ic log p_ic + (1 - y_ic) log(1 - p_ic)

Without unknown labels and weights this is `BCEWithLogitsLoss`, the loss of arXiv:2210.12843.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from medclip.types import Batch, UserError


def bce_loss(
    logits: Float[Tensor, "n c"], label: Float[Tensor, "n c"], pos_weight: Float[Tensor, " c"] | None = None
) -> Float[Tensor, ""]:
    """Mean over the known entries; labels are 0, 1, or NaN where unknown. 0 (with a gradient of 0) if none is known."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    known = label.isfinite()
    terms = F.binary_cross_entropy_with_logits(
        logits, torch.where(known, label, 0.0).to(logits.dtype), pos_weight=pos_weight, reduction="none"
    )
    return torch.where(known, terms, 0.0).sum() / known.sum().clamp(min=1)


class BceLoss(nn.Module):
    """`bce_loss` as a loss term on logits and `batch["label"]`.

    Args:
        pos_weight: by class, of its positives. "balanced": negatives / positives of the training data, so that both
            count alike; whoever has the data says it by `balance`. None: 1 each.
    """

    def __init__(self, pos_weight: Sequence[float | int] | str | None = None) -> None:
        super().__init__()
        if isinstance(pos_weight, str) and pos_weight != "balanced":
            raise UserError(f"loss bce: pos_weight is {pos_weight!r}: give a number a class, balanced, or null")
        self.balanced = pos_weight == "balanced"
        weight = None if pos_weight is None or isinstance(pos_weight, str) else torch.tensor(list(pos_weight)).float()
        self.register_buffer("pos_weight", weight, persistent=False)
        self.pos_weight: Tensor | None

    def balance(self, positives: Sequence[int], negatives: Sequence[int]) -> None:
        """Weigh by how many samples have each class and how many do not; a class that none has keeps the weight 1."""
        weights = [n / p if p and n else 1.0 for p, n in zip(positives, negatives, strict=True)]
        self.pos_weight = torch.tensor(weights, dtype=torch.float32)

    def forward(self, out: Float[Tensor, "n c"], batch: Batch) -> Float[Tensor, ""]:
        label = batch.get("label")
        if label is None:
            raise UserError("the data have no labels: say data.labels (see conf/data/cxr.yaml)")
        weight = self.pos_weight
        if weight is None and self.balanced:
            raise UserError("loss bce: pos_weight=balanced needs data that count their labels: give numbers instead")
        if weight is not None and len(weight) != out.shape[1]:
            raise UserError(f"loss bce: {len(weight)} class weights for {out.shape[1]} classes")
        return bce_loss(out, label, None if weight is None else weight.to(out.device))
