"""Cross entropy of classes of which a sample has one.

With z the logits and y the 0/1 label of a sample (one 1 in it): loss = mean over samples of -log softmax(z)_y.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from medclip.types import Batch


class ClassesLoss(nn.Module):
    """It as a loss term on logits and `batch["label"]`."""

    def forward(self, out: Float[Tensor, "n c"], batch: Batch) -> Float[Tensor, ""]:
        label = batch["label"]  # pyright: ignore[reportTypedDictNotRequiredAccess]
        logs = out.to(torch.promote_types(out.dtype, torch.float32)).log_softmax(1)
        return -(label.to(logs.dtype) * logs).sum(1).mean()
