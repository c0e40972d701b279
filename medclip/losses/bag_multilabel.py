"""Several findings of a slide at once: `bce_loss` on the logits of bags, unknown labels left out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from medclip.losses.bags import Bagged, labels_of, logits_of, numbers
from medclip.losses.bce import bce_loss
from medclip.types import Batch, UserError


class BagMultilabelLoss(nn.Module):
    """It as a loss term.

    Args:
        pos_weight: as of `BceLoss`: a number a class, "balanced" (negatives / positives of the training slides), or
            None.
    """

    def __init__(self, pos_weight: Sequence[float | int] | str | None = None) -> None:
        super().__init__()
        self.balanced = pos_weight == "balanced"
        self.register_buffer("pos_weight", numbers("bag_multilabel", "pos_weight", pos_weight), persistent=False)
        self.pos_weight: Tensor | None

    def balance(self, positives: Sequence[int], negatives: Sequence[int]) -> None:
        """Weigh by how many slides have each finding and how many do not; one that none has keeps the weight 1."""
        weights = [n / p if p and n else 1.0 for p, n in zip(positives, negatives, strict=True)]
        self.pos_weight = torch.tensor(weights, dtype=torch.float32)

    def forward(self, out: Bagged, batch: Batch) -> Float[Tensor, ""]:
        logits = logits_of(out)
        label = labels_of(batch, logits)
        weight = self.pos_weight
        if weight is None and self.balanced:
            raise UserError("loss bag_multilabel: pos_weight=balanced needs data that count their labels")
        if weight is not None and len(weight) != logits.shape[1]:
            raise UserError(f"loss bag_multilabel: {len(weight)} class weights for {logits.shape[1]} findings")
        return bce_loss(logits, label, None if weight is None else weight.to(logits.device))
