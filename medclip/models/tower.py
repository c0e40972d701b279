"""A CLIP's image tower as a plain ViT with timm's names."""

from __future__ import annotations

import re
from typing import Any

from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer as OpenClipVit
from timm.models.vision_transformer import VisionTransformer as TimmVit

from medclip.models.encoder import Weights
from medclip.models.load import load_clip
from medclip.types import UserError

_NAMES = (  # open_clip's -> timm's
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^conv1\.", "patch_embed.proj."),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.(\d+)\.ln_(\d)\.", r"blocks.\1.norm\2."),
    (r"^transformer\.resblocks\.(\d+)\.attn\.in_proj_", r"blocks.\1.attn.qkv."),
    (r"^transformer\.resblocks\.(\d+)\.attn\.out_proj\.", r"blocks.\1.attn.proj."),
    (r"^transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"blocks.\1.mlp.fc1."),
    (r"^transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"blocks.\1.mlp.fc2."),
)


def clip_tower(where: str, **source: Any) -> Weights:
    """The image tower of the CLIP that `load_clip(**source)` gives; `where` is what errors call it.

    open_clip's own ViT differs from timm's and MAE's in names, in a norm before its blocks (timm's `norm_pre`), in a
    patch embedding without bias, in the norms' eps, and in OpenAI's weights in the GELU.

    Raises:
        UserError: the CLIP cannot be loaded, or its image tower is no ViT.
    """
    clip = load_clip(**source)
    visual = clip.net.visual
    if isinstance(visual, TimmModel) and isinstance(visual.trunk, TimmVit):
        block: Any = visual.trunk.blocks[0]
        return Weights(visual.trunk.state_dict(), clip.preprocess, block.attn.num_heads, eps=block.norm1.eps)
    if not isinstance(visual, OpenClipVit) or visual.attn_pool is not None:
        raise UserError(f"the image tower of {where} is no plain ViT, so that no ViT can start from it")
    state = {_timm_name(key): value for key, value in visual.state_dict().items() if key != "proj"}
    state |= {"cls_token": state["cls_token"][None, None], "pos_embed": state["pos_embed"][None]}
    first: Any = visual.transformer.resblocks[0]
    quick = bool(clip.description["model_cfg"].get("quick_gelu"))
    return Weights(state, clip.preprocess, first.attn.num_heads, quick, first.ln_1.eps)


def _timm_name(key: str) -> str:
    for pattern, name in _NAMES:
        key = re.sub(pattern, name, key)
    return key
