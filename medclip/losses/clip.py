"""CLIP's contrastive loss: symmetric InfoNCE over all pairs of the global batch.

Radford et al. 2021, arXiv:2103.00020, figure 3, with L the n x n matrix `scale * image @ text.T`:

    loss = (mean_i -log softmax(L[i, :])[i] + mean_j -log softmax(L[:, j])[j]) / 2

The features come gathered from all ranks; this file knows of no ranks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from medclip.losses.logits import pair_logits
from medclip.types import Batch, ClipOutput


def clip_loss(out: ClipOutput) -> Float[Tensor, ""]:
    """Symmetric InfoNCE where row i of the images belongs to row i of the texts."""
    logits = pair_logits(out)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class ClipLoss(nn.Module):
    """`clip_loss` as a loss term."""

    def forward(self, out: ClipOutput, batch: Batch) -> Float[Tensor, ""]:
        return clip_loss(out)
