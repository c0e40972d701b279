"""Which parameters are decayed: matrices and kernels are, everything that shifts or scales is not.

Weight decay on biases, norm gains and the logit scale pulls them to 0, where they mean nothing (CLIP, arXiv:2103.00020,
section 2.5: "decoupled weight decay ... applied to all weights that are not gains or biases"). open_clip goes by the
number of dimensions and the names of norms; class and positional embeddings are spared here too, as in MAE and timm:
they are few, and each is a learnt offset. Token embeddings are decayed, as in CLIP.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

EMBEDDINGS = ("class_embedding", "cls_token", "cls_emb", "positional_embedding", "pos_embed", "position_embeddings")


def decay_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    weight_decay: float,
    no_decay: Sequence[str] = EMBEDDINGS,
) -> list[dict[str, Any]]:
    """Two parameter groups, decayed and not; an empty one is left out.

    Not decayed: parameters of fewer than two dimensions, and those one of whose name's parts is in `no_decay`.
    """
    decayed, spared = [], []
    for name, parameter in named_parameters:
        exempt = parameter.ndim < 2 or not set(no_decay).isdisjoint(name.split("."))
        (spared if exempt else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
