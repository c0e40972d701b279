"""An image tower's view of each place of an image, before anything is pooled: patch tokens, or the cells of a map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from medclip.types import UserError


def place_tokens(visual: nn.Module, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b places width"]:
    """Row by row, without class or register tokens.

    Args:
        visual: open_clip's ViT (after its last norm), its ResNet (the last map) or one of timm's trunks.
        image: normalised.

    Raises:
        UserError: a tower of another kind.
    """
    if isinstance(visual, VisionTransformer) and visual.attn_pool is None:
        before, visual.output_tokens = visual.output_tokens, True
        try:
            tokens = visual(image)[1]
        finally:
            visual.output_tokens = before
        # With pool_type none the class token is among them.
        return tokens[:, 1:] if tokens.shape[1] > visual.positional_embedding.shape[0] - 1 else tokens
    if isinstance(visual, ModifiedResNet):
        stages = (visual.stem, visual.layer1, visual.layer2, visual.layer3, visual.layer4)
        for stage in stages:
            image = stage(image)
        return image.flatten(2).transpose(1, 2)
    if isinstance(visual, TimmModel):
        return trunk_tokens(visual.trunk, image)
    raise UserError(
        f"model.visual.tokens: an image tower of the kind {type(visual).__name__} has no patch tokens to hand out: "
        "leave tokens out, or choose another CLIP"
    )


def trunk_tokens(trunk: Any, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b places width"]:
    """The same for a timm model."""
    found = trunk.forward_features(image)
    if found.ndim == 3:
        return found[:, getattr(trunk, "num_prefix_tokens", 0) :]
    last = getattr(trunk, "output_fmt", "NCHW") == "NHWC"
    return found.flatten(1, 2) if last else found.flatten(2).transpose(1, 2)


def freeze_unused(parameters: Sequence[nn.Parameter], out: Tensor) -> None:
    """Take the gradient from parameters on which `out` does not depend: other ranks would wait for it in vain."""
    asked = [p for p in parameters if p.requires_grad]
    if asked:
        for parameter, grad in zip(asked, torch.autograd.grad(out.sum(), asked, allow_unused=True), strict=True):
            parameter.requires_grad_(grad is not None)
