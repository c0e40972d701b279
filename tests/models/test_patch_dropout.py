"""Patch dropout: how many patches the blocks see, that the step's seed draws them, that evaluation sees all."""

from __future__ import annotations

import pytest
import torch

from medclip.models.clip import Clip
from medclip.models.lock import lock
from medclip.models.patch_dropout import patch_dropout
from medclip.types import UserError
from tests.models.test_lock import TIMM, clip_of

OPEN_CLIP = {"image_size": 64, "patch_size": 16, "layers": 2, "width": 32, "head_width": 16}
TOWERS = {
    "open_clip": (OPEN_CLIP, 16, 1),
    "timm": (TIMM | {"timm_model_name": "test_vit", "image_size": 160}, 100, 1),
    "eva": (TIMM | {"timm_model_name": "eva02_tiny_patch14_224", "image_size": 224}, 256, 1),
}


def tokens(clip: Clip) -> int:
    """Tokens that the last block is given."""
    trunk = getattr(clip.net.visual, "trunk", clip.net.visual)
    block = (trunk.blocks if hasattr(trunk, "blocks") else trunk.transformer.resblocks)[-1]
    seen = []
    hook = block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    clip.encode_image(torch.randn(2, 3, *clip.preprocess.size))
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("name", TOWERS)
def test_the_blocks_see_a_part_of_the_patches_and_every_class_token(name: str):
    vision, patches, classes = TOWERS[name]
    clip = clip_of(vision).train()
    assert tokens(clip) == patches + classes
    for rate in (0.5, 0.75):
        assert tokens(patch_dropout(clip, rate)) == patches * (1 - rate) + classes
    assert tokens(clip.eval()) == patches + classes


@pytest.mark.parametrize("name", TOWERS)
def test_a_seed_draws_the_same_patches_and_evaluation_draws_none(name: str):
    vision, *_ = TOWERS[name]
    clip = clip_of(vision).train()
    image = torch.randn(2, 3, *clip.preprocess.size)
    whole = clip.eval().encode_image(image)
    patch_dropout(clip, 0.5)
    assert torch.equal(clip.encode_image(image), whole)
    clip.train()

    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return clip.encode_image(image)

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))
    assert torch.equal(patch_dropout(clip, 0.0).encode_image(image), whole)


def test_names_of_the_weights_stay():
    clip = clip_of(OPEN_CLIP)
    before = list(clip.state_dict())
    assert list(patch_dropout(clip).state_dict()) == before


def test_what_cannot_be_is_one_line():
    with pytest.raises(UserError, match=r"adapt\.patch_dropout\.rate is 1"):
        patch_dropout(clip_of(OPEN_CLIP), 1)
    with pytest.raises(UserError, match=r"the image tower \(ResNet\) has no patches"):
        patch_dropout(clip_of(TIMM | {"timm_model_name": "resnet10t"}))
    with pytest.raises(UserError, match=r"is locked"):
        patch_dropout(lock(clip_of(OPEN_CLIP), "image"))
    assert patch_dropout(lock(clip_of(OPEN_CLIP), "image", 1)).train().net.visual.patch_dropout.training
