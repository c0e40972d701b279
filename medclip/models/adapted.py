"""What is done to a loaded model before it is trained: freezing, adapters, recomputation, in the order of the config.

`adapt=[lock_text,lora]` composes steps as `loss=[clip,distill]` composes terms: each yaml of conf/adapt names a
function `model -> model` and its settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def adapted(model: M, steps: Mapping[str, Callable[[M], M]]) -> M:
    """`model` after all `steps`."""
    for step in steps.values():
        model = step(model)
    return model
