"""Losses that a head makes itself, of its instances or branches (CLAM, ACMIL): mean over the bags, summed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from medclip.types import Batch, UserError


@runtime_checkable
class WithExtra(Protocol):
    """What a model of bags returns, as far as this loss goes."""

    @property
    def extra(self) -> Float[Tensor, "b m"]: ...


class ExtraLoss(nn.Module):
    """The columns of `out.extra`, each with its weight. A head without any adds 0.

    Args:
        weights: of each column, in the head's order (`extra_names`); None: 1 each.
    """

    def __init__(self, weights: Sequence[float | int] | None = None) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, out: WithExtra, batch: Batch) -> Float[Tensor, ""]:
        extra = out.extra.to(torch.promote_types(out.extra.dtype, torch.float32))
        if self.weights is not None and len(self.weights) != extra.shape[1]:
            raise UserError(f"loss extra: {len(self.weights)} weights for the {extra.shape[1]} losses of this head")
        weight = extra.new_ones(extra.shape[1]) if self.weights is None else extra.new_tensor(self.weights)
        return (extra @ weight).mean()
