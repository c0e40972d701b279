"""WiSE-FT: walk the straight line between a model and its fine-tuned self (Wortsman et al., arXiv 2109.01903).

    theta(alpha) = (1 - alpha) * theta_base + alpha * theta_tuned

over every floating-point tensor of the state dict. `logit_scale` is blended as the parameter it is, in log space (a
geometric mean of the temperatures), as the authors' code does by blending whole state dicts. The ends are the given
tensors themselves, to the bit. Integer tensors (position ids and the like) must agree; batch-norm step counters, which
no forward pass reads, are taken from the nearer end.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from medclip.types import UserError


def blend(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """The state dict at `alpha` in 0..1 on the line from `base` (0) to `tuned` (1).

    Raises:
        UserError: alpha outside 0..1, or state dicts of two different models.
    """
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha={alpha} is outside 0..1: 0 is the base, 1 the fine-tuned model")
    if lonely := sorted(base.keys() ^ tuned.keys()):
        raise UserError(f"cannot blend: {lonely[0]} is in one model only: give the base that the other grew from")
    for key, start in base.items():
        if start.shape != tuned[key].shape:
            raise UserError(
                f"cannot blend: {key} is {tuple(start.shape)} in the base, {tuple(tuned[key].shape)} in the other"
            )
        if (
            not start.is_floating_point()
            and not key.endswith("num_batches_tracked")
            and not torch.equal(start, tuned[key])
        ):
            raise UserError(f"cannot blend: the integer tensor {key} differs between the two models")
    return {key: _between(start, tuned[key], alpha) for key, start in base.items()}


def _between(start: Tensor, end: Tensor, alpha: float) -> Tensor:
    if alpha in (0, 1) or not start.is_floating_point():
        return (start if alpha < 0.5 else end).clone()
    return ((1 - alpha) * start.double() + alpha * end.double()).to(start.dtype)
