"""A ViT that says which findings an image has: one logit a class, from the mean of its patches.

As MAE (arXiv:2111.06377) and Medical MAE (arXiv:2210.12843) fine-tune: the class token takes part in attention but is
not read; the patches' mean goes through a norm of its own (`fc_norm`) into the head. The net is timm's, so that the
encoder of a masked autoencoder loads key by key; it can also start from a CLIP's image tower, or at random.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm.models.vision_transformer
import torch
from jaxtyping import Float
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from timm.layers import get_act_layer
from torch import Tensor, nn

from medclip.models.attention import choose_path
from medclip.models.encoder import DECODER, Weights, read_vit, refuse_unlike
from medclip.models.pixels import IMAGENET, Pixels
from medclip.models.tower import clip_tower
from medclip.types import Batch, Preprocess, UserError


@dataclass(frozen=True)
class VitShape:
    """All that the ViT is but its weights and classes; `pre_norm`, `quick_gelu` and `eps` are for weights of a CLIP."""

    image_size: int = 224
    patch_size: int = 16
    dim: int = 768
    depth: int = 12
    heads: int = 12
    drop_path: float = 0.0
    pre_norm: bool = False
    quick_gelu: bool = False
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise UserError(f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}")
        if self.dim % self.heads:
            raise UserError(f"dim={self.dim} must be a multiple of heads={self.heads}")
        if not 0 <= self.drop_path < 1:
            raise UserError(f"drop_path={self.drop_path} must be a share from 0 to below 1")

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        side = self.image_size // self.patch_size
        return side, side


class Classifier(nn.Module):
    """`Batch` -> logits (b, classes).

    Args:
        shape: sizes and the kind of ViT.
        classes: names of the logits, in order.
        preprocess: how its images are made.
        probe: train the head alone, on features that stay as they are: a linear probe.
    """

    tokenizer = None

    def __init__(self, shape: VitShape, classes: Sequence[str], preprocess: Preprocess, *, probe: bool = False) -> None:
        super().__init__()
        if len(set(classes)) < len(classes):
            raise UserError(f"model.classes is {list(classes)}: name each class once")
        self.shape = shape
        self.classes = list(classes)
        self.preprocess = preprocess
        self.probe = probe
        self.pixels = Pixels(preprocess)
        self.net = timm.models.vision_transformer.VisionTransformer(
            img_size=shape.image_size,
            patch_size=shape.patch_size,
            num_classes=len(classes),
            global_pool="avg",
            embed_dim=shape.dim,
            depth=shape.depth,
            num_heads=shape.heads,
            pre_norm=shape.pre_norm,
            drop_path_rate=0.0 if probe else shape.drop_path,
            norm_layer=partial(nn.LayerNorm, eps=shape.eps),  # pyright: ignore[reportArgumentType]
            act_layer=get_act_layer("quick_gelu" if shape.quick_gelu else "gelu"),
        )
        assert isinstance(self.net.head, nn.Linear)
        nn.init.trunc_normal_(self.net.head.weight, std=2e-5)  # as published: fine-tuning starts from p = 1/2
        if probe:
            self.net.requires_grad_(False)
            self.net.head.requires_grad_(True)

    @property
    def device(self) -> torch.device:
        return self.pixels.mean.device

    @property
    def description(self) -> dict[str, Any]:
        """Plain data from which `classifier_from` makes this model again, without its weights."""
        return {
            "kind": "classifier",
            "shape": asdict(self.shape),
            "classes": self.classes,
            "preprocess_cfg": self.preprocess.as_dict(),
            "probe": self.probe,
        }

    def forward(self, batch: Batch) -> Float[Tensor, "b classes"]:
        """Logits of `batch["image"]`, uint8 or float (b, 3, h, w)."""
        x = self.pixels.normalise_image(batch)
        choose_path(self.net, x)
        return self.net(x)


def build_vit(
    classes: Sequence[str] | None,
    *,
    init: str | Mapping[str, Any] | None = None,
    preprocess: Mapping[str, Any] | None = None,
    probe: bool = False,
    **shape: Any,
) -> Classifier:
    """A classifier; its ViT random, or taken from something trained, with a new head.

    Args:
        classes: names of the logits.
        init: a checkpoint of `medclip train` (MAE, classifier or CLIP), a file of MAE's keys, an open_clip folder or
            hf-hub: name, or load_clip's own words (`{architecture, pretrained}`). Positions are resized where the image
            size differs; what is not taken is said.
        preprocess: `mean` and `std`, on a 0..1 scale; else those of `init`, else ImageNet's.
        probe: train the head alone.
        **shape: see `VitShape`.

    Raises:
        UserError: sizes that do not go together, or weights that cannot be read or do not fit.
    """
    known = [field.name for field in fields(VitShape)]
    if unknown := set(shape) - set(known):
        raise UserError(f"model.{min(unknown)} is unknown: there are {', '.join(known)}")
    if not classes:
        raise UserError(
            "the model has no classes: say which findings, e.g. data.labels='{names: [Edema], from: columns}'"
        )
    made = VitShape(**shape)
    if init is None:
        return Classifier(made, list(classes), _preprocess(made, preprocess, None), probe=probe)
    where = init if isinstance(init, str) else str(init.get("pretrained") or "a random CLIP")
    found = _weights(init, where).on_grid(made.grid, where)
    if found.heads not in (None, made.heads):
        raise UserError(f"model.init={where} has {found.heads} heads, model.heads is {made.heads}: choose its size")
    made = replace(made, pre_norm="norm_pre.weight" in found.state, quick_gelu=found.quick_gelu, eps=found.eps)
    model = Classifier(made, list(classes), _preprocess(made, preprocess, found.preprocess), probe=probe)
    _take(model, found.state, where)
    return model


def classifier_from(description: Mapping[str, Any]) -> Classifier:
    """The described model (`Classifier.description`) with random weights."""
    return Classifier(
        VitShape(**description["shape"]),
        description["classes"],
        Preprocess.from_dict(description["preprocess_cfg"]),
        probe=description["probe"],
    )


def _preprocess(shape: VitShape, asked: Mapping[str, Any] | None, own: Preprocess | None) -> Preprocess:
    base = IMAGENET if own is None else {"mean": own.mean, "std": own.std, "interpolation": own.interpolation}
    return Preprocess.from_dict(base | dict(asked or {}) | {"size": shape.image_size})


def _weights(init: str | Mapping[str, Any], where: str) -> Weights:
    if not isinstance(init, str):
        return clip_tower(where, **init)
    path = Path(init).expanduser()
    if path.is_file() or path.suffix == ".ckpt":
        found = read_vit(path)
        if found is not None:
            return found
    return clip_tower(where, pretrained=init)


def _take(model: Classifier, state: Mapping[str, Tensor], where: str) -> None:
    own = model.net.state_dict()
    taken = {key: value for key, value in state.items() if not key.startswith(("norm.", "head.", *DECODER))}
    # The norm after the mean is another classifier's alone.
    wanted = {key: value for key, value in own.items() if not key.startswith(("head.", "fc_norm.")) or key in taken}
    refuse_unlike(wanted, taken, where)
    model.net.load_state_dict(taken, strict=False)
    left = sorted({_short(key) for key in state if key not in taken})
    new = sorted({_short(key) for key in own if key not in taken})
    _say(f"model.init: {where}: not taken: {', '.join(left) or 'nothing'}; new: {', '.join(new)}")


def _short(key: str) -> str:
    return "the decoder" if key.startswith(DECODER) else key.rpartition(".")[0] or key


@rank_zero_only
def _say(line: str) -> None:
    print(line, file=sys.stderr)
