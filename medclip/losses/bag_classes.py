"""Cross entropy of a slide's class, weighted by class.

With z the logits of a bag and y its class, over the n bags whose class is known:

    loss = -1/n * sum w_y [(1 - s) log softmax(z)_y + s/c sum_k log softmax(z)_k]

s being the smoothing. torch's own weighted cross entropy divides by the sum of the weights in the batch, so that with
one bag a step, which is how these heads are trained, the weights would cancel out; here they do not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from medclip.losses.bags import Bagged, labels_of, logits_of, numbers
from medclip.types import Batch, UserError


def bag_classes_loss(
    logits: Float[Tensor, "b c"],
    label: Float[Tensor, "b c"],
    weight: Float[Tensor, " c"] | None = None,
    smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Mean over the bags whose one-hot label has no NaN; 0, with a gradient of 0, if there is none."""
    known = label.isfinite().all(1)
    label = torch.where(known[:, None], label, 0.0)
    target = (1 - smoothing) * label + smoothing / label.shape[1]
    terms = -(target * logits.log_softmax(1)).sum(1)
    if weight is not None:
        terms = terms * (label @ weight.to(label))
    return torch.where(known, terms, 0.0).sum() / known.sum().clamp(min=1)


class BagClassesLoss(nn.Module):
    """`bag_classes_loss` as a loss term.

    Args:
        weight: a number a class. "balanced": n / (c n_k) with n_k of n training slides in class k, so that all classes
            count alike; whoever has the data says it by `balance`. None: 1 each.
        smoothing: share of the target that is spread over all classes.

    Raises:
        UserError: no such weight, or a share outside 0..1.
    """

    def __init__(self, weight: Sequence[float | int] | str | None = None, smoothing: float | int = 0.0) -> None:
        super().__init__()
        if not 0 <= smoothing < 1:
            raise UserError(f"loss bag_classes: smoothing is {smoothing}: give a share from 0 to below 1")
        self.balanced = weight == "balanced"
        self.smoothing = smoothing
        self.register_buffer("weight", numbers("bag_classes", "weight", weight), persistent=False)
        self.weight: Tensor | None

    def balance(self, positives: Sequence[int], negatives: Sequence[int]) -> None:
        """Weigh by how many slides each class has; one without any keeps the weight 1."""
        total = sum(positives)
        weights = [total / (len(positives) * n) if n else 1.0 for n in positives]
        self.weight = torch.tensor(weights, dtype=torch.float32)

    def forward(self, out: Bagged, batch: Batch) -> Float[Tensor, ""]:
        logits = logits_of(out)
        label = labels_of(batch, logits)
        if self.weight is None and self.balanced:
            raise UserError(
                "loss bag_classes: weight=balanced needs data that count their labels: give numbers instead"
            )
        if self.weight is not None and len(self.weight) != logits.shape[1]:
            raise UserError(f"loss bag_classes: {len(self.weight)} class weights for {logits.shape[1]} classes")
        weight = None if self.weight is None else self.weight.to(logits.device)
        return bag_classes_loss(logits, label, weight, self.smoothing)
