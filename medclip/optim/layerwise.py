"""Layer-wise learning-rate decay for fine-tuning: the nearer to the pixels or the words, the smaller the steps.

Clark et al. 2020, arXiv:2003.10555 (ELECTRA), counted as MAE's fine-tuning does (arXiv:2111.06377, appendix A.1), for a
tower of L blocks:

    lr(i) = lr * decay^(L + 1 - i),   i = 0: embeddings, i = b + 1: block b, i = L + 1: last norm and head

so that the head has the whole rate, and with L = 12, decay = 0.55 (arXiv:2210.12843) the embeddings 4.2e-4 of it. The
two towers of a CLIP count for themselves, each with a decay of its own; the logit scale has the whole rate.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    """`scaled_groups` of a single ViT, by the names of its parameters."""
    named = list(named_parameters)
    blocks = max((int(found[1]) + 1 for name, _ in named if (found := _BLOCK.search(name))), default=0)
    scales = [decay ** (blocks + 1 - layer_of(name, blocks)) for name, _ in named]
    return scaled_groups(named, scales, lr, weight_decay, no_decay)


def scaled_groups(
    named: Sequence[tuple[str, nn.Parameter]],
    scales: Sequence[float],
    lr: float,
    weight_decay: float,
    no_decay: Sequence[str] = EMBEDDINGS,
) -> list[dict[str, Any]]:
    """`decay_groups` of all that share a scale, smallest first, with their `lr` and `lr_scale`, its share of `lr`."""
    shared: dict[float, list[tuple[str, nn.Parameter]]] = {}
    for one, scale in zip(named, scales, strict=True):
        shared.setdefault(scale, []).append(one)
    return [
        group | {"lr": lr * scale, "lr_scale": scale}
        for scale in sorted(shared)
        for group in decay_groups(shared[scale], weight_decay, no_decay)
    ]


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
    _check("layer_decay", layer_decay)
    groups = layerwise_groups(named_parameters, lr, layer_decay, weight_decay, no_decay)
    return over_groups(groups, lr, betas, eps, fused)


def clip_layerwise_adamw(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    lr: float,
    places: Callable[[Iterable[str]], Mapping[str, tuple[str | None, str, int]]],
    image_decay: float = 0.75,
    text_decay: float = 0.75,
    betas: Sequence[float] = (0.9, 0.98),
    eps: float = 1e-6,
    weight_decay: float = 0.2,
    no_decay: Sequence[str] = EMBEDDINGS,
    fused: bool = True,
) -> torch.optim.AdamW:
    """AdamW over a CLIP's parameters, each tower with its own decay of the rate; `lr` is the heads' and the scale's.

    Args:
        named_parameters: what is trained; layers count from the head, so that frozen ones below change nothing.
        places: names -> (tower, part, L + 1 - i), as `medclip.models.layers.places` does.
        image_decay: from layer to layer of the image tower; 1: none.
        text_decay: of the text tower.

    Raises:
        UserError: there is nothing to train, or a decay is not in 0..1.
    """
    _check("image_decay", image_decay)
    _check("text_decay", text_decay)
    named = list(named_parameters)
    decay = {"image": image_decay, "text": text_decay, None: 1.0}
    where = places(name for name, _ in named)
    scales = [decay[tower] ** depth for tower, _, depth in (where[name] for name, _ in named)]
    return over_groups(scaled_groups(named, scales, lr, weight_decay, no_decay), lr, betas, eps, fused)


def _check(key: str, decay: float) -> None:
    if not 0 < decay <= 1:
        raise UserError(f"optim.{key} is {decay}: give a number above 0, at most 1 (1: no decay)")
