"""Grades of a slide, of which a higher one includes the lower: binary cross entropy of each threshold.

Logit k of c - 1 says whether the grade is above k, and the label is 1 for every threshold that the grade is above
(Frank & Hall 2001, ECML; the loss of CORAL, Cao et al. 2020, arXiv:1901.07884, with importance weights of 1). Over the
n bags whose grade is known:

    loss = 1/n sum_i sum_k -[y_ik log sigmoid(z_ik) + (1 - y_ik) log(1 - sigmoid(z_ik))]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from medclip.losses.bags import Bagged, labels_of, logits_of
from medclip.types import Batch


def bag_ordinal_loss(logits: Float[Tensor, "b k"], label: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
    """Mean over the bags whose cumulative label has no NaN; 0, with a gradient of 0, if there is none."""
    known = label.isfinite().all(1)
    label = torch.where(known[:, None], label, 0.0)
    terms = F.binary_cross_entropy_with_logits(logits, label, reduction="none").sum(1)
    return torch.where(known, terms, 0.0).sum() / known.sum().clamp(min=1)


class BagOrdinalLoss(nn.Module):
    """`bag_ordinal_loss` as a loss term."""

    def forward(self, out: Bagged, batch: Batch) -> Float[Tensor, ""]:
        logits = logits_of(out)
        return bag_ordinal_loss(logits, labels_of(batch, logits))
