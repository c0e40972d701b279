"""Survival in intervals of time: the likelihood of a hazard an interval (Zadeh & Schmid 2021, IEEE TPAMI 43:3126).

With h_k = sigmoid(z_k) the chance that the event falls into interval k if it did not before, S_k = prod_{j <= k}
(1 - h_j) the chance to be without it after k, S_{-1} = 1, and y the interval of a bag's time:

    event seen:  -log h_y - log S_{y-1}
    censored:    -log S_y

averaged over the bags. With `alpha` the terms of censored slides weigh 1 - alpha, as multimodal survival models of
slides are trained (Chen et al. 2021, MCAT).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from medclip.losses.bags import Bagged, followed, labels_of, logits_of
from medclip.types import Batch, UserError


def survival_loss(
    logits: Float[Tensor, "b k"], label: Float[Tensor, "b k"], event: Float[Tensor, " b"], alpha: float = 0.0
) -> Float[Tensor, ""]:
    """Mean over the bags whose interval (one-hot) and event are known; 0, with a gradient of 0, if there is none."""
    known = label.isfinite().all(1) & event.isfinite()
    label, event = torch.where(known[:, None], label, 0.0), torch.where(known, event, 0.0)
    before = 1 - label.cumsum(1)  # 1 in the intervals before y
    # log(1 - sigmoid(z)) is logsigmoid(-z), exact where the hazard rounds to 0 or 1.
    survived = -(before * F.logsigmoid(-logits)).sum(1)  # -log S_{y-1}
    seen = event * (survived - (label * F.logsigmoid(logits)).sum(1))
    censored = (1 - event) * (survived - (label * F.logsigmoid(-logits)).sum(1))
    return torch.where(known, seen + (1 - alpha) * censored, 0.0).sum() / known.sum().clamp(min=1)


class SurvivalLoss(nn.Module):
    """`survival_loss` as a loss term.

    Args:
        alpha: 0 for the likelihood; up to 1, where censored slides do not count.
    """

    def __init__(self, alpha: float | int = 0.0) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise UserError(f"loss survival: alpha is {alpha}: give a share from 0 to 1")
        self.alpha = alpha

    def forward(self, out: Bagged, batch: Batch) -> Float[Tensor, ""]:
        logits = logits_of(out)
        _, event = followed(batch)
        return survival_loss(logits, labels_of(batch, logits), event, self.alpha)
