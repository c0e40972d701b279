"""What the denoising auto-encoder draws: its mean squared error, a part of MEVF's loss (arXiv:1909.11867)."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from medclip.types import Batch


@runtime_checkable
class WithDrawing(Protocol):
    """What a model with an auto-encoder returns, as far as this loss goes."""

    @property
    def drawn(self) -> Float[Tensor, " n"]: ...


class DrawnLoss(nn.Module):
    """Mean over the rows of each row's mean squared error."""

    def forward(self, out: WithDrawing, batch: Batch) -> Float[Tensor, ""]:
        return out.drawn.float().mean()
