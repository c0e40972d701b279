"""The masked autoencoder's loss: the mean squared error of the masked patches' pixels.

He et al. 2022, arXiv:2111.06377, section 3, with x the true and y the drawn pixels of a patch, M the masked ones:

    loss = 1/|M| * sum_{i in M} mean_j (y_ij - x_ij)^2

Optionally x is normalised by its own patch's mean and (unbiased) variance; the chest X-ray recipe (arXiv:2210.12843)
does not. Visible patches do not count: the output has none.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from medclip.types import Batch


@runtime_checkable
class Drawn(Protocol):
    """What a masked autoencoder returns, as far as the loss goes: masked patches, drawn and true, in the same order."""

    @property
    def prediction(self) -> Float[Tensor, "b m pixels"]: ...

    @property
    def target(self) -> Float[Tensor, "b m pixels"]: ...


def mae_loss(
    prediction: Float[Tensor, "b m pixels"], target: Float[Tensor, "b m pixels"], *, normalise: bool = False
) -> Float[Tensor, ""]:
    """Mean over patches of the mean squared error over a patch's pixels, in float32 at least."""
    if normalise:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    wide = torch.promote_types(prediction.dtype, torch.float32)
    return F.mse_loss(prediction.to(wide), target.to(wide))


class MaeLoss(nn.Module):
    """`mae_loss` as a loss term.

    Args:
        normalise: the original's `norm_pix_loss`.
    """

    def __init__(self, normalise: bool = False) -> None:
        super().__init__()
        self.normalise = normalise

    def forward(self, out: Drawn, batch: Batch) -> Float[Tensor, ""]:
        return mae_loss(out.prediction, out.target, normalise=self.normalise)
