"""What a head says of a bag, and what heads share about its padding.

A head is a module, built from `dim` (numbers a patch's features have) and `outputs` (logits), whose `extra_names` names
the columns of `Pooled.extra`:

    (bag (b, n, dim), real (b, n), label (b, outputs) | None) -> Pooled

Without labels, the auxiliary losses that need them are 0. A row of `real` without any patch is padding of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ROWS = 8192  # patches that are worked on at a time where memory would otherwise grow with the bag


class Pooled(NamedTuple):
    """A row a bag.

    `attention` is not negative, and sums to 1 over the real patches for each of its k; `slide` is the vector that the
    logits are made of (where each output has its own, their mean); `extra` holds the head's own losses.
    """

    logits: Float[Tensor, "b outputs"]
    attention: Float[Tensor, "b k n"]
    slide: Float[Tensor, "b e"]
    extra: Float[Tensor, "b m"]


def some(real: Bool[Tensor, "b n"]) -> Bool[Tensor, "b n"]:
    """`real`, where a row without any patch has them all: a softmax over nothing would be NaN."""
    return real | ~real.any(1, keepdim=True)


def shares(scores: Float[Tensor, "b k n"], real: Bool[Tensor, "b n"]) -> Float[Tensor, "b k n"]:
    """Softmax over the real patches, float32 or finer; 0 for padding."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return scores.masked_fill(~some(real).unsqueeze(1), -torch.inf).softmax(2)


def by_rows(layers: Callable[[Tensor], Tensor], x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n e"]:
    """`layers(x)`, made anew in the backward pass where a bag has more than ROWS patches.

    Of what the layers compute on the way, only one stretch of rows is in memory at any time.

    Args:
        layers: works on each patch by itself.
        x: patches; of any float type, which the layers see as float32.
    """
    if x.shape[1] <= ROWS:
        return layers(widened(x))

    def stretch(part: Tensor) -> Tensor:
        return layers(widened(part))

    parts = [checkpoint(stretch, part, use_reentrant=False) for part in x.split(ROWS, 1)]
    return torch.cat(parts, 1)  # pyright: ignore[reportArgumentType, reportCallIssue]


def widened(x: Tensor) -> Tensor:
    """Half-precision features as float32, which the weights have."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
