"""AdamW (Loshchilov and Hutter, arXiv:1711.05101) with decay only where it belongs, in one fused kernel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from medclip.optim.groups import EMBEDDINGS, decay_groups
from medclip.types import UserError


def adamw(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    lr: float,
    betas: Sequence[float] = (0.9, 0.98),
    eps: float = 1e-6,
    weight_decay: float = 0.2,
    no_decay: Sequence[str] = EMBEDDINGS,
    fused: bool = True,
) -> torch.optim.AdamW:
    """AdamW over `decay_groups`; `fused` is 1.1 x (CPU) as fast and more on GPUs, and not for `precision: 16-mixed`.

    Raises:
        UserError: there is nothing to train.
    """
    return over_groups(decay_groups(named_parameters, weight_decay, no_decay), lr, betas, eps, fused)


def over_groups(
    groups: list[dict[str, Any]], lr: float, betas: Sequence[float], eps: float, fused: bool
) -> torch.optim.AdamW:
    """AdamW over parameter groups, whoever made them.

    Raises:
        UserError: there is nothing to train.
    """
    if not groups:
        raise UserError("no parameter is left to train: everything is frozen")
    return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=fused)
