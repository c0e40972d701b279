"""Low-rank adapters: the weight W of a linear layer stays, and a product of two thin matrices beside it is learnt.

Hu et al. 2022, arXiv:2106.09685, equation 3: h = W x + alpha / r * B A x, with A (r x in) random and B (out x r) zero
at the start, so that the first model is the one that was loaded. The layers are peft's. A checkpoint holds W, A and B;
`medclip.models.merge` makes plain weights of them wherever one is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

from medclip.models.clip import Clip, OpenClip
from medclip.models.layers import places
from medclip.models.lock import hold
from medclip.models.split_attention import SplitAttention
from medclip.types import UserError

_TOWERS = {"both": ("image", "text"), "image": ("image",), "text": ("text",)}


def lora(
    clip: Clip,
    rank: int = 16,
    alpha: float = 16,
    dropout: float = 0.0,
    towers: Literal["both", "image", "text"] = "both",
    targets: Sequence[str] | None = None,
    free: Sequence[str] = ("logit_*",),
) -> Clip:
    """Freeze `clip` and put adapters beside its linear layers, in place. What is frozen is in eval mode from then on.

    Args:
        clip: its `.description` tells of the adapters afterwards.
        rank: r.
        alpha: weight of the adapters, times r.
        dropout: of what the adapters are fed.
        towers: which get adapters.
        targets: shell patterns of names, such as `visual.*.mlp.c_fc` or `*.attention.self.query`, of linear layers and
            ungrouped convolutions in these towers. None: all linear layers of the blocks, of attention and MLP both.
        free: patterns of parameters that are trained as they are; `logit_*` are scale and bias of the logits.

    Raises:
        UserError: peft is missing, a number is out of range, a pattern fits nothing, or there are adapters already.
    """
    _check(clip, rank, alpha, dropout, towers)
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("adapt=[lora] needs peft: pip install 'medclip-adapt[lora]'") from error
    net = clip.net
    _split_attention(net, _TOWERS[towers])
    blocks, others = _layers(net, _TOWERS[towers])
    layers = blocks if targets is None else _fitting([*blocks, *others], targets, "targets", "layer")
    if not layers:
        raise UserError(
            f"adapt.lora: no block of towers={towers} has a linear layer (a ResNet's are convolutions): name layers in "
            "adapt.lora.targets, or take the other tower"
        )
    net.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=layers)  # type: ignore[arg-type]
    inject_adapter_in_model(config, net)
    own = dict(net.named_parameters())
    for name in _fitting(list(own), free, "free", "parameter"):
        own[name].requires_grad_(True)
    hold(clip)
    told = {"rank": rank, "alpha": alpha, "dropout": dropout, "towers": towers, "free": list(free)}
    clip.description = {**clip.description, "lora": told | {"targets": None if targets is None else list(targets)}}
    return clip


def _check(clip: Clip, rank: int, alpha: float, dropout: float, towers: str) -> None:
    if "lora" in clip.description:
        raise UserError("adapt.lora: the model has adapters already: name it once in adapt=[…]")
    if rank < 1 or alpha <= 0:
        raise UserError(f"adapt.lora.rank is {rank}, alpha {alpha}: give a rank of 1 or more and an alpha above 0")
    if not 0 <= dropout < 1:
        raise UserError(f"adapt.lora.dropout is {dropout}: give a share from 0 to below 1")
    if towers not in _TOWERS:
        raise UserError(f"adapt.lora.towers={towers}: choose one of {', '.join(_TOWERS)}")


def _split_attention(net: OpenClip, towers: Sequence[str]) -> None:
    where = places(name for name, _ in net.named_parameters())
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            place = where.get(f"{name}.in_proj_weight")
            if place and place.tower in towers and place.part == "block":
                net.set_submodule(name, SplitAttention(module))


def _layers(net: OpenClip, towers: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of what adapters can stand beside: the linear layers of the blocks, and everything else."""
    where = places(name for name, _ in net.named_parameters())
    blocks, others = [], []
    uncalled = {module.out_proj for module in net.modules() if isinstance(module, nn.MultiheadAttention)}
    for name, module in net.named_modules():
        linear = isinstance(module, nn.Linear) and module not in uncalled
        if linear or (isinstance(module, nn.Conv2d) and module.groups == 1):
            place = where.get(f"{name}.weight")
            if place and place.tower in towers:
                (blocks if linear and place.part == "block" else others).append(name)
    return blocks, others


def _fitting(names: Sequence[str], patterns: Sequence[str], key: str, what: str) -> list[str]:
    """Those of `names` that one of `patterns` fits, every one of which must fit something."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f"adapt.lora.{key}: {pattern!r} fits no {what}; some are {', '.join(names[:: len(names) // 6 + 1])}"
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
