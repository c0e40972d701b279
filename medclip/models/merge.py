"""Plain weights of a model with low-rank adapters: W + alpha / r * B A (arXiv:2106.09685); peft is not needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from medclip.models.split_attention import IN_PROJ
from medclip.types import UserError

_WEIGHT, _A, _B = ".base_layer.weight", ".lora_A.default.weight", ".lora_B.default.weight"


def merged(state: Mapping[str, Tensor], lora: Any, where: str) -> dict[str, Tensor]:
    """A state dict of `medclip.models.lora` under open_clip's names, the adapters added to the weights.

    Args:
        state: of the `net`, peft's names and those of `SplitAttention` in it.
        lora: what its description says of the adapters.
        where: what errors call it.

    Raises:
        UserError: the description does not say the adapters' weight, or factors are missing or do not fit.
    """
    try:
        scale = float(lora["alpha"]) / int(lora["rank"])
        plain = {}
        for key, value in state.items():
            if key.endswith(_WEIGHT):
                stem = key.removesuffix(_WEIGHT)
                value = _add(value, state[stem + _A], state[stem + _B], scale)
            if not key.endswith((_A, _B)):
                plain[key.replace(".base_layer.", ".").replace(f".{IN_PROJ}.", ".in_proj_")] = value
    except (KeyError, TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"the adapters in {where} do not fit its weights ({error!r}): get it again") from error
    return plain


def _add(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Of a linear layer (out, in), or a convolution (out, in, h, w) with A (r, in, h, w) and B (out, r, 1, 1)."""
    product = b.flatten(1).float() @ a.flatten(1).float()
    return (weight.float() + scale * product.reshape(weight.shape)).to(weight.dtype)
