"""Where a ViT looks: attention rollout (Abnar & Zuidema 2020, arXiv 2005.00928, section 3).

A block passes its tokens on by attention and by the residual connection, so with the attention averaged over heads it
mixes them by (A + I) / 2; the product of these matrices over all blocks says how much each input patch went into each
token of the last block. The row of what the model pools (the class token, or the mean over the patches) is the map.
It is one map an image, whichever class is asked for: it shows what the model looked at, not why it decided.

Read from the inputs of the attention modules while the tower runs, so it serves timm's `Attention` (ViT classifiers,
MAE encoders, timm towers of a CLIP) and torch's `MultiheadAttention` (open_clip's own ViTs), fused kernels or not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

Pool = Literal["token", "mean"]


def attention_layers(tower: nn.Module) -> list[nn.Module]:
    """The self-attention modules of a plain ViT that can be read; empty for other towers.

    A decoder beside the encoder (MAE's) is left out.
    """
    from timm.models.vision_transformer import Attention  # here: it takes a second, which `--help` need not wait

    kinds = (Attention, nn.MultiheadAttention)
    return [module for name, module in tower.named_modules() if isinstance(module, kinds) and "decoder" not in name]


def attention_weights(layer: nn.Module, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n n"]:
    """Self-attention of `layer` on its own input, averaged over heads; rows sum to 1."""
    part: Any = layer
    if isinstance(layer, nn.MultiheadAttention):
        joint = nn.functional.linear(tokens, part.in_proj_weight, part.in_proj_bias)
        heads, scale, norms = part.num_heads, part.head_dim**-0.5, (nn.Identity(), nn.Identity())
    else:
        joint, heads, scale, norms = part.qkv(tokens), part.num_heads, part.scale, (part.q_norm, part.k_norm)
    query, key = joint.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)[:2]  # (b, heads, n, d / heads)
    scores = (norms[0](query) * scale).float() @ norms[1](key).float().mT
    return scores.softmax(dim=-1).mean(dim=1)


def rollout(layers: list[Float[Tensor, "b n n"]]) -> Float[Tensor, "b n n"]:
    """Product of (A + I) / 2 over the layers, given first to last; row: token at the end, column: at the start."""
    mixed = torch.eye(layers[0].shape[-1], device=layers[0].device).expand_as(layers[0])
    for attention in layers:
        mixed = (attention @ mixed + mixed) / 2
    return mixed


@torch.inference_mode()
def attention_map(
    tower: nn.Module, run: Callable[[Tensor], Any], images: Tensor, pool: Pool | None = None
) -> Float[Tensor, "b gh gw"] | None:
    """Share of each patch in what the tower pools from each image.

    Args:
        tower: the image tower, in evaluation mode.
        run: passes images through the tower, once and unmasked; its result is not looked at.
        images: (b, 3, h, w), as `run` takes them.
        pool: what is pooled; None asks the tower (see `pooling`).

    Returns:
        Maps over the patch grid that are >= 0 and sum to 1 with what is left on the class token; None where the tower
        is no plain ViT (a convolutional tower, windows, patches left out).
    """
    found: list[Tensor] = []

    def read(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        tokens = args[0]
        if isinstance(layer, nn.MultiheadAttention) and not layer.batch_first:
            tokens = tokens.transpose(0, 1)
        found.append(attention_weights(layer, tokens))

    handles = [layer.register_forward_pre_hook(read) for layer in attention_layers(tower)]
    try:
        run(images)
    finally:
        for handle in handles:
            handle.remove()
    grid = patch_grid(tower, images)
    if not found or grid is None or len({a.shape for a in found}) != 1:
        return None
    prefix = found[0].shape[-1] - grid[0] * grid[1]
    if prefix < 0 or len(found[0]) != len(images):
        return None
    mixed = rollout(found)
    pool = pool or pooling(tower)
    rows = mixed[:, 0] if pool == "token" and prefix else mixed[:, prefix:].mean(dim=1)
    return rows[:, prefix:].unflatten(-1, grid)


def pooling(tower: nn.Module) -> Pool:
    """What the tower's features are pooled from: the class token, or the mean over patches (and attention pooling)."""
    for module in tower.modules():
        own = getattr(module, "global_pool", None) or getattr(module, "pool_type", None)
        if isinstance(own, str):
            return "token" if own in ("token", "tok") else "mean"
    return "token"


def patch_grid(tower: nn.Module, images: Tensor) -> tuple[int, int] | None:
    """Rows and columns of patches, from the convolution that cuts them; None if there is none."""
    for module in tower.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == module.stride:
            height, width = images.shape[-2:]
            return height // module.kernel_size[0], width // module.kernel_size[1]
    return None


def image_tower(model: nn.Module) -> nn.Module:
    """The part of a model that sees images: a CLIP's image tower; else all of it."""
    net = getattr(model, "net", model)
    return getattr(net, "visual", net)
