"""A learning rate that changes from epoch to epoch: a warm-up by steps, then a factor at each of some epochs.

What bilinear attention (arXiv:1805.07932), MEVF and PubMedCLIP train with: 0.5, 1, 1.5 and 2 times the rate in the
first four epochs, 2 times after them, and 0.75 of what it was at epochs 10, 12, 14, …
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from medclip.types import UserError


def factor_at(epoch: int, *, warmup: Sequence[float], decay: float, at: Sequence[int]) -> float:
    """What the rate is multiplied with in `epoch`, counted from 0."""
    if epoch < len(warmup):
        return warmup[epoch]
    return (warmup[-1] if warmup else 1.0) * decay ** sum(start <= epoch for start in at)


def by_epochs(
    optimizer: Optimizer,
    total: int,
    *,
    epochs: int,
    warmup: Sequence[float] = (),
    decay: float = 1.0,
    at: Sequence[int] = (),
) -> LambdaLR:
    """The schedule for `total` optimiser steps of `epochs` epochs; without a word more the rate stays as it is.

    Args:
        optimizer: its groups' `lr` are multiplied.
        total: optimiser steps of the whole run.
        epochs: of the whole run.
        warmup: factors of the first epochs; the last one holds from then on.
        decay: factor at each of `at`.
        at: epochs, counted from 0.

    Raises:
        UserError: no epoch, or a factor that is not above 0.
    """
    if epochs < 1:
        raise UserError(f"task.schedule.epochs is {epochs}: give the epochs of the run, 1 or more")
    if min([decay, *warmup]) <= 0:
        raise UserError("task.schedule: warmup and decay multiply the learning rate: give numbers above 0")
    return LambdaLR(
        optimizer, lambda step: factor_at(step * epochs // max(1, total), warmup=warmup, decay=decay, at=at)
    )
