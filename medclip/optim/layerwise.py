"""Layer-wise learning-rate decay for fine-tuning a ViT: the nearer to the pixels, the smaller the steps.

Clark et al. 2020, arXiv:2003.10555 (ELECTRA), counted as MAE's fine-tuning does (arXiv:2111.06377, appendix A.1), for a
ViT of L blocks:

    lr(i) = lr * decay^(L + 1 - i),   i = 0: embeddings, i = b + 1: block b, i = L + 1: last norm and head

so that the head has the whole rate, and with L = 12, decay = 0.55 (arXiv:2210.12843) the embeddings 4.2e-4 of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from medclip.optim.adamw import over_groups
from medclip.optim.groups import EMBEDDINGS, decay_groups
from medclip.types import UserError

# timm's names, and open_clip's for its own ViT.
_BLOCK = re.compile(r"(?:^|\.)(?:blocks|resblocks)\.(\d+)\.")
_FIRST = {"cls_token", "pos_embed", "patch_embed", "norm_pre", "class_embedding", "positional_embedding", "conv1"}


def layer_of(name: str, blocks: int) -> int:
    """Number of the layer, 0 to `blocks` + 1, that the parameter `name` belongs to."""
    if found := _BLOCK.search(name):
        return int(found[1]) + 1
    return 0 if not _FIRST.isdisjoint(name.split(".")) else blocks + 1


def layerwise_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    lr: float,
    decay: float,
    weight_decay: float,
    no_decay: Sequence[str] = EMBEDDINGS,
) -> list[dict[str, Any]]:
    """`decay_groups` of each layer with its own `lr`, and `lr_scale`, its share of the whole rate."""
    named = list(named_parameters)
    blocks = max((int(found[1]) + 1 for name, _ in named if (found := _BLOCK.search(name))), default=0)
    layers: dict[int, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named:
        layers.setdefault(layer_of(name, blocks), []).append((name, parameter))
    groups = []
    for layer in sorted(layers):
        scale = decay ** (blocks + 1 - layer)
        groups += [
            group | {"lr": lr * scale, "lr_scale": scale}
            for group in decay_groups(layers[layer], weight_decay, no_decay)
        ]
    return groups


def layerwise_adamw(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    lr: float,
    layer_decay: float = 0.55,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.05,
    no_decay: Sequence[str] = EMBEDDINGS,
    fused: bool = True,
) -> torch.optim.AdamW:
    """AdamW over `layerwise_groups`; `lr` is the head's.

    Raises:
        UserError: there is nothing to train, or `layer_decay` is not in 0..1.
    """
    if not 0 < layer_decay <= 1:
        raise UserError(f"optim.layer_decay is {layer_decay}: give a number above 0, at most 1 (1: no decay)")
    groups = layerwise_groups(named_parameters, lr, layer_decay, weight_decay, no_decay)
    return over_groups(groups, lr, betas, eps, fused)
