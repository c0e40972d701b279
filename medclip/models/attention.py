"""Attention by the path that is fastest for the arithmetic and the device.

torch's `scaled_dot_product_attention` never holds the (tokens x tokens) matrix; on CPUs it is 1.1 x as fast for a whole
MAE step in float32, but in bfloat16 the explicit product and softmax are (scripts/bench/mae.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers.attention import Attention
from torch import Tensor, nn


def use_fused(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `scaled_dot_product_attention` is the faster path."""
    return device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type that matrix products of `x` have here: autocast's, where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def attend(
    q: Float[Tensor, "b heads m d"], k: Float[Tensor, "b heads n d"], v: Float[Tensor, "b heads n d"]
) -> Float[Tensor, "b heads m d"]:
    """softmax(q k^T / sqrt(d)) v."""
    if use_fused(q.device, q.dtype):
        return F.scaled_dot_product_attention(q, k, v)
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v


@contextmanager
def plain_attention() -> Iterator[None]:
    """Within it, without gradients, torch's own layers compute attention step by step.

    Their fused path has no counterpart in ONNX, and no count of operations.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def choose_path(net: nn.Module, x: Tensor) -> None:
    """Set the path of every timm attention in `net` for an input like `x`."""
    fused = use_fused(x.device, compute_dtype(x))
    for module in net.modules():
        if isinstance(module, Attention):
            module.fused_attn = fused  # pyright: ignore[reportAttributeAccessIssue]  # Final only for TorchScript
