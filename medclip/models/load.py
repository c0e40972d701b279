"""One function that loads a CLIP from anywhere, and never feeds it images made for another one.

open_clip loads a bare weights file with the default mean, std and resize mode, whatever the model was trained with,
and says nothing (open_clip issue 1068): SigLIP, CLIPA or MobileCLIP weights then quietly score worse than they should.
Here the preprocessing belongs to the weights: taken from the folder, tag or checkpoint that knows it, and refused where
two sources contradict each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from open_clip.timm_model import TimmModel
from timm.models.vision_transformer import VisionTransformer

from medclip.models.build import build_clip, plain
from medclip.models.clip import Clip
from medclip.models.encoder import DECODER, Weights, read_vit, refuse_unlike
from medclip.models.source import find_source, unlike
from medclip.models.weights import load_state
from medclip.types import Preprocess, UserError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_clip(
    architecture: str | Mapping[str, Any] | None = None,
    pretrained: str | None = None,
    *,
    preprocess: Mapping[str, Any] | None = None,
    image_size: int | tuple[int, int] | None = None,
    vision_init: str | None = None,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    channels_last: bool = False,
    device: str | torch.device = "cpu",
    cache_dir: str | None = None,
) -> Clip:
    """Build a CLIP and load its weights.

    Args:
        architecture: an open_clip name ("ViT-B-16"), or an inline `model_cfg` (embed_dim, vision_cfg, text_cfg). Not
            needed where `pretrained` describes itself; given nevertheless, it must be the same.
        pretrained: a tag of the architecture ("laion2b_s34b_b88k"), "hf-hub:org/name", an open_clip folder
            ("local-dir:PATH" or the path; loaded without network), a file of weights (.safetensors, .bin, .pt), or one
            of our own checkpoints (.ckpt). None: random weights.
        preprocess: mean, std, interpolation, resize_mode, fill_color where nothing else knows them. Of weights that
            know theirs, it may only repeat it.
        image_size: feed images of this size instead; the positional embedding of a ViT is resized.
        vision_init: start the image tower, a ViT of timm's, from a masked autoencoder or a classifier: a checkpoint of
            `medclip train`, or a file of MAE's. Where it says its mean and std, the CLIP's images are made with these.
        precision: type of the weights; training wants fp32 (and the trainer's own `precision`).
        channels_last: memory layout of the image tower: 1.4 x as fast for convolutional towers on CPUs, and faster on
            GPUs in half precision; nothing for a ViT.
        device: where the model goes.
        cache_dir: where downloads are kept.

    Raises:
        UserError: unknown architecture or tag, no open_clip folder, unreadable or unfitting weights, contradicting
            preprocessing.
    """
    if precision not in _DTYPES:
        raise UserError(f"precision={precision} is unknown: one of {', '.join(_DTYPES)}")
    source = find_source(plain(architecture), pretrained, plain(preprocess), cache_dir)
    description = deepcopy(source.description)
    if image_size is not None:
        description["model_cfg"]["vision_cfg"]["image_size"] = plain(image_size)
    size = description["model_cfg"]["vision_cfg"].get("image_size", 224)
    description["preprocess_cfg"]["size"] = [size, size] if isinstance(size, int) else list(size)
    tower = None if vision_init is None else _read_tower(vision_init)
    if tower is not None and tower.preprocess is not None:
        description["preprocess_cfg"] |= {key: plain(getattr(tower.preprocess, key)) for key in ("mean", "std")}
    _refuse_other(vision_init or source.where, Preprocess.from_dict(description["preprocess_cfg"]), preprocess)

    clip = build_clip(description, initial_towers=source.state is None)
    if image_size is not None:
        _resize_timm(clip, source.where)
    if source.state is not None:
        load_state(clip.net, source.state, source.where)
    if tower is not None:
        _start_tower(clip, tower, str(vision_init))
    clip.net.to(_DTYPES[precision])
    if channels_last:
        clip.use_channels_last()
    return clip.to(device)


def _refuse_other(where: str, own: Preprocess, asked: Mapping[str, Any] | None) -> None:
    if key := unlike(own, asked or {}):
        if key == "size":
            raise UserError(f"preprocess.size is not the model's {own.size}: say image_size= to feed another size")
        raise UserError(
            f"preprocess.{key}={plain((asked or {})[key])} contradicts {where}, whose own is "
            f"{plain(getattr(own, key))}: leave `preprocess` out"
        )


def _resize_timm(clip: Clip, where: str) -> None:
    visual = clip.net.visual
    if not isinstance(visual, TimmModel):
        return  # open_clip's own towers are built at their size, and `load_state` resizes the embedding
    before = {key: value.shape for key, value in visual.state_dict().items()}
    visual.set_input_size(clip.preprocess.size)
    if before != {key: value.shape for key, value in visual.state_dict().items()}:
        # Plain open_clip builds a timm tower at its native size only, so such a model could never be exported.
        raise UserError(f"the image tower of {where} has a fixed image size: choose the architecture of your size")


def _read_tower(path: str) -> Weights:
    found = read_vit(Path(path).expanduser())
    if found is None:
        raise UserError(
            f"vision_init={path} is no ViT with timm's names: give a file of MAE's, or a run of experiment=mae_cxr"
        )
    return found


def _start_tower(clip: Clip, tower: Weights, where: str) -> None:
    visual = clip.net.visual
    if not isinstance(visual, TimmModel) or not isinstance(visual.trunk, VisionTransformer):
        raise UserError(
            f"vision_init={where} needs an image tower with timm's names: choose model=vit_s16_clip, or an "
            "architecture whose vision_cfg has a timm_model_name such as vit_base_patch16_224"
        )
    trunk = visual.trunk
    grid = trunk.patch_embed.grid_size
    assert grid is not None
    own = trunk.state_dict()
    state = tower.on_grid(grid, where).state
    taken = {key: value for key, value in state.items() if not key.startswith(("fc_norm.", "head.", *DECODER))}
    refuse_unlike({key: own[key] for key in own if not key.startswith("fc_norm.")}, taken, where)
    trunk.load_state_dict(taken, strict=False)
