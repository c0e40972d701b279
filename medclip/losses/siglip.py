"""SigLIP's loss: every pair of the global batch is a binary question of its own.

Zhai et al. 2023, arXiv:2303.15343, equation 1 and algorithm 1, with L = `scale * image @ text.T + bias`, and z = 1 on
the diagonal, -1 elsewhere:

    loss = -1/n * sum_ij log sigmoid(z_ij * L_ij)

The sum runs over all n x n pairs and is divided by n, the rows of the *global* batch, as in the paper. open_clip 3.3
divides by the rows of one rank and lets DDP average over the ranks, which comes to the same; here it holds for uneven
ranks too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from medclip.losses.logits import pair_logits
from medclip.types import Batch, ClipOutput


def siglip_loss(out: ClipOutput) -> Float[Tensor, ""]:
    """Sigmoid loss where row i of the images belongs to row i of the texts."""
    logits = pair_logits(out)
    sign = 2 * torch.eye(len(logits), device=logits.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(sign * logits).sum() / len(logits)


class SiglipLoss(nn.Module):
    """`siglip_loss` as a loss term."""

    def forward(self, out: ClipOutput, batch: Batch) -> Float[Tensor, ""]:
        return siglip_loss(out)
