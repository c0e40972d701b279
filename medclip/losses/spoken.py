"""Cross entropy of an answer's tokens, each told those before it: -log p(answer | image, question).

Summed over the tokens of an answer, its end included, and averaged over the rows whose right answer is known.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from medclip.types import Batch

_IGNORED = -100


@runtime_checkable
class WithTokens(Protocol):
    """What a model that speaks returns, as far as this loss goes; a target of -100 is none."""

    @property
    def logits(self) -> Float[Tensor, "n t vocabulary"]: ...

    @property
    def target(self) -> Int64[Tensor, "n t"]: ...


class SpokenLoss(nn.Module):
    """Mean over the rows of each answer's negative log-likelihood, in nats."""

    def forward(self, out: WithTokens, batch: Batch) -> Float[Tensor, ""]:
        known = (out.target != _IGNORED).any(1).sum().clamp(min=1)
        total = F.cross_entropy(
            out.logits.flatten(0, 1).float(), out.target.flatten(), ignore_index=_IGNORED, reduction="sum"
        )
        return total / known
