"""Gradient checkpointing: the same gradients, dropout and frozen parts included, with fewer activations kept."""

from __future__ import annotations

import pytest
import torch

from medclip.models.checkpointing import checkpointing
from medclip.models.clip import Clip
from medclip.models.load import load_clip
from medclip.models.lock import lock
from medclip.types import UserError
from tests.models.test_lock import TIMM, clip_of, kept_bytes


def gradients(clip: Clip) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    clip.train().zero_grad()
    image, text = torch.randn(4, 3, *clip.preprocess.size), torch.randint(5, 25, (4, clip.tokenizer.context_length))
    out = clip({"image": image, "text": text})
    logits = out.logit_scale * out.image_features @ out.text_features.T + (out.logit_bias or 0)
    torch.nn.functional.logsigmoid(logits).diagonal().sum().backward()
    return {name: p.grad.clone() for name, p in clip.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("blocks", [None, 1])
def test_the_same_gradients(any_cfg: dict, blocks: int | None):
    """In BERT with its dropout too; and of what follows a frozen part, which reentrant checkpointing leaves without."""
    torch.manual_seed(0)
    clip = load_clip(any_cfg)
    if blocks:
        lock(lock(clip, "image", blocks), "text", blocks)
    plain = gradients(clip)
    assert plain and all(p.grad is not None for p in clip.parameters() if p.requires_grad)
    again = gradients(checkpointing(clip))
    assert plain.keys() == again.keys()
    for name, reference in plain.items():
        torch.testing.assert_close(again[name], reference, msg=name)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_fewer_activations_are_kept_in_the_named_tower_alone(any_cfg: dict, tower: str):
    any_cfg["vision_cfg"]["layers"] = any_cfg["text_cfg"]["layers"] = 4
    clip = load_clip(any_cfg).train()
    other = "text" if tower == "image" else "image"
    before = {name: kept_bytes(clip, name) for name in (tower, other)}
    checkpointing(clip, **{other: False})
    assert kept_bytes(clip, tower) < 0.6 * before[tower]
    assert kept_bytes(clip, other) == before[other]


def test_a_tower_that_cannot_is_one_line():
    resnet = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "image_size": 64}
    with pytest.raises(UserError, match=r"image tower \(ModifiedResNet\) cannot .*adapt\.checkpointing\.image=false"):
        checkpointing(clip_of(resnet))
    assert checkpointing(clip_of(resnet), image=False).net.transformer.grad_checkpointing
    with pytest.raises(UserError, match=r"image tower \(InceptionV3"):
        checkpointing(clip_of(TIMM | {"timm_model_name": "inception_v3", "image_size": 299}))
