"""What a head says of a bag, and what heads share about its padding.

A head is a module, built from `dim` (numbers a patch's features have) and `outputs` (logits), whose `extra_names` names
the columns of `Pooled.extra`:

    (bag (b, n, dim), real (b, n), label (b, outputs) | None) -> Pooled

Without labels, the auxiliary losses that need them are 0. A row of `real` without any patch is padding of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ROWS = 8192  # patches that are worked on at a time where memory would otherwise grow with the bag
KEPT = 4  # stretches of ROWS up to which what is computed on the way is kept, since memory is no matter yet


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


def by_rows(layers: Callable[[Tensor], Tensor], x: Tensor | Sequence[Tensor]) -> tuple[Float[Tensor, "b r e"], ...]:
    """`layers(x)` in stretches of ROWS patches, made anew in the backward pass where there are more than KEPT.

    So of what the layers compute on the way, only one stretch of a long bag is in memory at any time; and gradients of
    stretches that are never joined are never added up at the size of the bag.

    Args:
        layers: works on each patch by itself.
        x: patches (b, n, d), or stretches of them (b, r, d); of any float type, half precision as float32.
    """

    def stretch(part: Tensor) -> Tensor:
        return layers(widened(part))

    parts = x.split(ROWS, 1) if isinstance(x, Tensor) else x
    if len(parts) <= KEPT:
        return tuple(stretch(part) for part in parts)
    return tuple(checkpoint(stretch, part, use_reentrant=False) for part in parts)  # pyright: ignore


def pool(attention: Float[Tensor, "b k n"], parts: Sequence[Float[Tensor, "b r e"]]) -> Float[Tensor, "b k e"]:
    """The sums of the patches, weighted by each attention."""
    shares = attention.to(parts[0].dtype).split(ROWS, 2)
    return torch.stack([share @ part for share, part in zip(shares, parts, strict=True)]).sum(0)


def take(parts: Sequence[Float[Tensor, "b r e"]], index: Int64[Tensor, "b k"]) -> Float[Tensor, "b k e"]:
    """The patches of these numbers."""
    rows = torch.arange(len(index), device=index.device).unsqueeze(1)
    found = []
    for i, part in enumerate(parts):
        local = index - i * ROWS
        inside = (local >= 0) & (local < part.shape[1])
        found.append(part[rows, local.clamp(0, part.shape[1] - 1)] * inside.unsqueeze(2))
    return torch.stack(found).sum(0)


def widened(x: Tensor) -> Tensor:
    """Half-precision features as float32, which the weights have."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
