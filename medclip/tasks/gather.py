"""One global batch out of all ranks' features, with gradient, padding rows dropped.

Done once, in the task, so that no loss needs to know about ranks. With equal parameters on all ranks and a loss that is
a function of the global batch, DDP's mean over ranks of the parameter gradients then equals the gradient that one
process would get from the whole batch: the backward pass *sums* the ranks' gradients of a feature row (each rank holds
a loss of its own), and DDP's mean divides by the number of ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from medclip.types import ClipOutput


class _GatherRows(torch.autograd.Function):
    """Rows of all ranks, in rank order; every rank must bring the same shape.

    `torch.distributed.nn.all_gather` does this too, but is deprecated since torch 2.14 and its successor is not in 2.6.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def gather_rows(rows: Float[Tensor, "b d"], keep: list[int]) -> Float[Tensor, "n d"]:
    """The first `keep[r]` of rank r's `b` rows, for all ranks r, in rank order."""
    if len(keep) == 1:
        return rows[: keep[0]]
    b = len(rows)
    gathered = _GatherRows.apply(rows)
    assert isinstance(gathered, Tensor)
    if keep == [b] * len(keep):
        return gathered
    real = [rank * b + row for rank, count in enumerate(keep) for row in range(count)]
    return gathered[torch.tensor(real, device=rows.device, dtype=torch.long)]


def count_real(n: int, device: torch.device) -> list[int]:
    """How many rows are real on each rank."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [n]
    counts = [torch.empty(1, dtype=torch.long, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([n], device=device))
    return torch.cat(counts).tolist()


def gather(out: ClipOutput, n: int) -> ClipOutput:
    """The global batch from this rank's `b` rows, of which the first `n` are real.

    All ranks take part with the same `b`, also one whose rows are all padding, and all get the same rows in the same
    order. The result has no rows when no rank had a real one.
    """
    keep = count_real(n, out.image_features.device)
    image = gather_rows(out.image_features, keep)
    return out._replace(image_features=image, text_features=gather_rows(out.text_features, keep))
