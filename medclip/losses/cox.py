"""Cox's partial likelihood (Cox 1972; ties as Breslow 1974) of one risk a bag, for survival with censoring.

With r the log-risks of the batch, t the times and E the bags whose event was seen:

    loss = -1/|E| * sum_{i in E} [r_i - log sum_{j: t_j >= t_i} exp(r_j)]

The sums run over the bags of a rank's batch, so that a batch of one teaches nothing, and one of a few little:
`data.patches` makes bags small enough that many fit into a batch. A batch without an event costs 0.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from medclip.losses.bags import Bagged, followed, logits_of
from medclip.types import Batch, UserError


def cox_loss(risk: Float[Tensor, " b"], time: Float[Tensor, " b"], event: Float[Tensor, " b"]) -> Float[Tensor, ""]:
    """Mean over the events of the batch; bags whose time or event is NaN take no part."""
    known = time.isfinite() & event.isfinite()
    risk, time, event = risk[known], time[known], event[known]
    at_risk = time[None, :] >= time[:, None]  # [i, j]: j is still there when i's time comes
    total = risk[None, :].expand(len(risk), -1).masked_fill(~at_risk, -torch.inf).logsumexp(1)
    return (event * (total - risk)).sum() / event.sum().clamp(min=1)


class CoxLoss(nn.Module):
    """`cox_loss` as a loss term, of a model with one output (`model.bins=1`)."""

    compares_bags = True  # which the task holds against the size of the batches

    def forward(self, out: Bagged, batch: Batch) -> Float[Tensor, ""]:
        logits = logits_of(out)
        if logits.shape[1] != 1:
            raise UserError(
                f"loss cox is of one risk a slide, the model has {logits.shape[1]} outputs: say data.bins=1, or "
                "loss=[survival]"
            )
        time, event = followed(batch)
        return cox_loss(logits[:, 0], time, event)
