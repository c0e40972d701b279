"""How many bytes an optimiser keeps for each parameter, found out on tiny ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

Named = list[tuple[str, nn.Parameter]]


def optimiser_bytes(make: Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer], named: Named) -> int:
    """Bytes of the state after a first step.

    Every parameter has a stand-in of the same name and number of dimensions, two wide; a state of the stand-in's shape
    is one of the parameter's. Anything smaller (the step's number) is not counted.

    Args:
        make: named parameters -> optimiser.
        named: those that are trained.
    """
    small = {name: nn.Parameter(torch.ones((2,) * max(p.ndim, 1))) for name, p in named}
    optimiser: Any = make(small.items())
    for parameter in small.values():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    total = 0
    for name, parameter in named:
        for value in optimiser.state[small[name]].values():
            if isinstance(value, torch.Tensor) and value.shape == small[name].shape:
                total += parameter.numel() * value.element_size()
    return total
