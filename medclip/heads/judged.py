"""What a head says of a batch of questions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Judged(NamedTuple):
    """Logits of the answers, and what the head looked at.

    `own` is False where the logit is none of this row's: it went through another branch. `attention` sums to 1 over
    objects and words for each glimpse.
    """

    logits: Float[Tensor, "b answers"]
    own: Bool[Tensor, "b answers"]
    attention: Float[Tensor, "b glimpses objects words"]


def all_own(logits: Float[Tensor, "b answers"]) -> Bool[Tensor, "b answers"]:
    return torch.ones_like(logits, dtype=torch.bool)
