"""Layer-wise decay: the recipe's numbers, every parameter once, and the floor of the schedule."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from medclip.optim.layerwise import layer_of, layerwise_adamw
from medclip.optim.schedule import warmup_cosine
from medclip.types import UserError


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    """Of the recipe's depth."""
    return VisionTransformer(
        img_size=32, patch_size=16, embed_dim=8, depth=12, num_heads=2, num_classes=3, global_pool="avg"
    )


def scales(net: nn.Module, prefix: str = "model.net.") -> dict[str, tuple[float, float]]:
    """Parameter -> (share of the whole rate, weight decay) that it is trained with."""
    optimizer = layerwise_adamw(((prefix + name, p) for name, p in net.named_parameters()), lr=1e-3)
    names = {id(p): name for name, p in net.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(1e-3 * group["lr_scale"])
        for parameter in group["params"]:
            assert names[id(parameter)] not in found
            found[names[id(parameter)]] = (group["lr_scale"], group["weight_decay"])
    assert found.keys() == set(names.values())
    return found


def test_the_recipes_numbers(vit):
    """0.55^13 = 4.2142e-4 for the embeddings, 0.55^12 = 7.6622e-4 for block 0, 0.55 for block 11, 1 for the head."""
    found = {name: scale for name, (scale, _) in scales(vit).items()}
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        assert found[name] == pytest.approx(4.2142e-4, rel=1e-4)
    assert found["blocks.0.attn.qkv.weight"] == pytest.approx(7.6622e-4, rel=1e-4)
    assert found["blocks.10.mlp.fc1.bias"] == pytest.approx(0.55**2)
    assert found["blocks.11.norm2.weight"] == pytest.approx(0.55)
    assert found["head.weight"] == found["head.bias"] == found["fc_norm.weight"] == 1.0


def test_decay_spares_vectors_tokens_and_positions(vit):
    spared = {name for name, (_, decay) in scales(vit).items() if decay == 0}
    expected = {name for name, p in vit.named_parameters() if p.ndim == 1} | {"cls_token", "pos_embed"}
    assert spared == expected
    assert {decay for name, (_, decay) in scales(vit).items() if name not in expected} == {0.05}


def test_open_clips_names():
    assert layer_of("model.net.visual.conv1.weight", 12) == 0
    assert layer_of("model.net.visual.transformer.resblocks.11.ln_1.weight", 12) == 12
    assert layer_of("model.net.visual.proj", 12) == 13


def test_a_head_alone_has_the_whole_rate(vit):
    optimizer = layerwise_adamw([("model.net.head.weight", vit.head.weight)], lr=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1]


def test_every_group_ends_at_its_share_of_the_floor(vit):
    """min_lr 1e-5 is above the embeddings' own peak, 1e-3 * 0.55^13 = 4.2e-7: they end at 1e-5 * 0.55^13."""
    optimizer = layerwise_adamw(vit.named_parameters(), lr=1e-3)
    schedule = warmup_cosine(optimizer, 20, warmup=2, min_lr=1e-5)
    for _ in range(20):
        optimizer.step()
        schedule.step()
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(1e-5 * group["lr_scale"])
    with pytest.raises(UserError, match=r"optim\.lr is 0\.001"):
        warmup_cosine(layerwise_adamw(vit.named_parameters(), lr=1e-3), 20, min_lr=2e-3)


def test_steps_are_in_proportion(vit):
    """With the first moment's sign alone, AdamW moves each weight by its own rate."""
    net = VisionTransformer(img_size=32, patch_size=16, embed_dim=8, depth=12, num_heads=2, num_classes=3)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = layerwise_adamw(net.named_parameters(), lr=1.0, weight_decay=0.0)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, share in {"cls_token": 0.55**13, "blocks.6.mlp.fc2.weight": 0.55**6, "head.bias": 1.0}.items():
        moved = before[name] - net.get_parameter(name)
        torch.testing.assert_close(moved, torch.full_like(moved, share), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 1.1, -0.5])
def test_decay_out_of_range(decay, vit):
    with pytest.raises(UserError, match=r"optim\.layer_decay"):
        layerwise_adamw(vit.named_parameters(), lr=1e-3, layer_decay=decay)


def test_nothing_to_train():
    with pytest.raises(UserError, match="frozen"):
        layerwise_adamw([], lr=1e-3)
