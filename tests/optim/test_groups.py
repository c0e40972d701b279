"""Decay groups on a real open_clip model: every parameter once, each where it belongs."""

from __future__ import annotations

import open_clip
import pytest
import torch
from torch import nn

from medclip.optim.adamw import adamw
from medclip.optim.groups import decay_groups
from medclip.types import UserError


@pytest.fixture(scope="module")
def clip() -> nn.Module:
    vision = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 16, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}
    return open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text, init_logit_bias=-10.0)


def test_split_of_a_real_model(clip):
    names = {id(p): name for name, p in clip.named_parameters()}
    decayed, spared = decay_groups(clip.named_parameters(), 0.2)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.2, 0.0)
    heavy = {names[id(p)] for p in decayed["params"]}
    light = {names[id(p)] for p in spared["params"]}
    assert heavy.isdisjoint(light) and heavy | light == set(names.values())
    assert {"logit_scale", "logit_bias", "positional_embedding", "visual.class_embedding"} <= light
    assert "visual.positional_embedding" in light
    assert all(name in light for name in names.values() if "ln_" in name or name.endswith("bias"))
    assert {"text_projection", "visual.proj", "visual.conv1.weight", "token_embedding.weight"} <= heavy
    assert sum("attn.in_proj_weight" in name or "mlp.c_fc.weight" in name for name in heavy) == 8
    # open_clip's own rule spares the same parameters, but for the 2-d positional embeddings.
    theirs = {n for n, p in clip.named_parameters() if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n}
    assert light - theirs == {"positional_embedding", "visual.positional_embedding"}
    assert theirs <= light


def test_decay_moves_only_the_decayed(clip):
    """With zero gradients AdamW only decays: the spared stay to the bit, the others shrink by lr * decay."""
    before = {name: p.detach().clone() for name, p in clip.named_parameters()}
    optimizer = adamw(clip.named_parameters(), lr=0.1, weight_decay=0.5)
    assert optimizer.defaults["fused"]
    for p in clip.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name in ("visual.ln_pre.weight", "logit_scale", "positional_embedding"):
        assert torch.equal(clip.get_parameter(name), before[name])
    torch.testing.assert_close(clip.get_parameter("visual.proj"), before["visual.proj"] * 0.95)


def test_names_can_be_added(clip):
    decayed, _ = decay_groups(clip.named_parameters(), 0.2, no_decay=["token_embedding"])
    assert all(p is not clip.token_embedding.weight for p in decayed["params"])


def test_nothing_to_train_is_said():
    with pytest.raises(UserError, match="frozen"):
        adamw([], lr=1e-3)
