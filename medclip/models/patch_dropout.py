"""Patch dropout: in training, the image tower sees a random part of the patches.

Li et al. 2022, arXiv:2212.00794 (FLIP), section 3: with half of the patches the image tower has about half of the work,
so that a batch can be larger; the paper ends with a short training on whole images. Class tokens stay. Which patches do
is drawn anew for each image, by torch's generator on its device.
"""

from __future__ import annotations

from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer as OpenClipVit
from timm.layers.patch_dropout import PatchDropout, PatchDropoutWithIndices
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmVit
from torch import nn

from medclip.models.clip import Clip
from medclip.types import UserError


def patch_dropout(clip: Clip, rate: float = 0.5) -> Clip:
    """Drop the share `rate` of each image's patches in training, in place. Evaluation sees all.

    timm's module serves open_clip's ViT too, whose own draws on the CPU and makes a GPU wait.

    Raises:
        UserError: `rate` is not in 0..1, the image tower is no ViT, or it is locked.
    """
    if not 0 <= rate < 1:
        raise UserError(f"adapt.patch_dropout.rate is {rate}: give the share of patches to drop, from 0 to below 1")
    visual = clip.net.visual
    if any(part is visual for part in clip.still):
        raise UserError(
            "adapt.patch_dropout: the image tower is locked and in eval mode, where nothing is dropped: leave one out"
        )
    trunk = visual.trunk if isinstance(visual, TimmModel) else visual
    if isinstance(trunk, OpenClipVit):
        trunk.patch_dropout = PatchDropout(rate).train(clip.training)  # type: ignore[assignment]
    elif isinstance(trunk, TimmVit):
        trunk.patch_drop = PatchDropout(rate, trunk.num_prefix_tokens).train(clip.training)
    elif isinstance(trunk, Eva):  # turns its rotary positions by the indices
        trunk.patch_drop = PatchDropoutWithIndices(rate, trunk.num_prefix_tokens).train(clip.training)
    else:
        kind = type(trunk).__name__ if isinstance(trunk, nn.Module) else "none"
        raise UserError(f"adapt.patch_dropout: the image tower ({kind}) has no patches to leave out: it needs a ViT")
    return clip
