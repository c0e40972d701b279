"""Linear warm-up, then a cosine down to `min_lr`, by optimiser steps.

With w warm-up steps of T, and lr the group's own learning rate:

    step t < w:  lr * (t + 1) / w
    step t >= w: min_lr + (lr - min_lr) * (1 + cos(pi * (t - w) / (T - w))) / 2

which is open_clip's schedule for `min_lr` = 0. `min_lr` is for a group of the whole rate: one that has but a share of
it (`lr_scale`, see `layerwise`) ends at that share.
"""

from __future__ import annotations

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from medclip.types import UserError


def lr_at(step: int, *, lr: float, total: int, warmup: int, min_lr: float) -> float:
    """Learning rate of the `step`-th optimiser step, counted from 0."""
    if step < warmup:
        return lr * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2


def warmup_cosine(optimizer: Optimizer, total: int, *, warmup: float = 0.05, min_lr: float = 0.0) -> LambdaLR:
    """The schedule for `total` optimiser steps; each parameter group keeps its own peak.

    Args:
        optimizer: its groups' `lr` are the peaks, their `lr_scale` (1 if none) multiplies `min_lr`.
        total: optimiser steps of the whole run.
        warmup: steps if 1 or more, else a fraction of `total`.
        min_lr: learning rate at the end.

    Raises:
        UserError: `warmup` or `min_lr` is out of range.
    """
    scales = [group.get("lr_scale", 1.0) for group in optimizer.param_groups]
    peaks = [group["lr"] for group in optimizer.param_groups]
    whole = min(peak / scale for peak, scale in zip(peaks, scales, strict=True))
    if warmup < 0:
        raise UserError(f"task.schedule.warmup is {warmup}: give steps (1000) or a fraction of the run (0.05)")
    if not 0 <= min_lr <= whole or whole == 0:
        raise UserError(f"optim.lr is {whole}, task.schedule.min_lr {min_lr}: 0 <= min_lr <= lr, 0 < lr must hold")
    steps = round(warmup if warmup >= 1 else warmup * total)
    ends = [min_lr * scale for scale in scales]
    return LambdaLR(
        optimizer,
        [partial(_factor, lr=lr, total=total, warmup=steps, min_lr=end) for lr, end in zip(peaks, ends, strict=True)],
    )


def _factor(step: int, *, lr: float, total: int, warmup: int, min_lr: float) -> float:
    return lr_at(step, lr=lr, total=total, warmup=warmup, min_lr=min_lr) / lr
