"""Layer-wise decay: the recipes' numbers, every parameter once, and the floor of the schedule; one tower and two."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pytest
import torch
from open_clip import CLIP
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from medclip.models.layers import places
from medclip.optim.layerwise import clip_layerwise_adamw, layer_of, layerwise_adamw
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


# The two towers of a CLIP

FAMILIES = {
    "open_clip": {"image_size": 32, "patch_size": 16, "layers": 12, "width": 8, "head_width": 8},
    "timm": {"image_size": 32, "timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "linear"},
    "convnext": {"image_size": 64, "timm_model_name": "convnext_atto", "timm_pool": "avg", "timm_proj": "linear"},
}


def clip_scales(
    vision: dict, prefix: str = "model.net.", frozen: str | None = None, **words: float
) -> dict[str, float]:
    text = {"context_length": 8, "vocab_size": 16, "layers": 12, "width": 8, "heads": 2}
    net = CLIP(embed_dim=8, vision_cfg=dict(vision), text_cfg=text)  # type: ignore[arg-type]
    named = {prefix + name: p for name, p in net.named_parameters() if frozen is None or not re.search(frozen, name)}
    optimizer = clip_layerwise_adamw(named.items(), lr=1e-3, places=places, **words)
    names = {id(p): name.removeprefix(prefix) for name, p in named.items()}
    found = {names[id(p)]: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert len(found) == len(named) == sum(len(group["params"]) for group in optimizer.param_groups)
    assert all(group["lr"] == pytest.approx(1e-3 * group["lr_scale"]) for group in optimizer.param_groups)
    return found


# Written by hand: 0.5^13, 0.5^12, … for the image tower of 12 blocks, 0.9^13, … for the text tower of 12.
TABLE = {
    "visual.conv1.weight": 0.0001220703125,
    "visual.class_embedding": 0.0001220703125,
    "visual.positional_embedding": 0.0001220703125,
    "visual.ln_pre.weight": 0.0001220703125,
    "visual.transformer.resblocks.0.attn.in_proj_weight": 0.000244140625,
    "visual.transformer.resblocks.1.mlp.c_fc.bias": 0.00048828125,
    "visual.transformer.resblocks.5.ln_1.weight": 0.0078125,
    "visual.transformer.resblocks.10.mlp.c_proj.weight": 0.25,
    "visual.transformer.resblocks.11.attn.out_proj.weight": 0.5,
    "visual.ln_post.weight": 1.0,
    "visual.proj": 1.0,
    "token_embedding.weight": 0.2541865828329,
    "positional_embedding": 0.2541865828329,
    "transformer.resblocks.0.attn.in_proj_weight": 0.282429536481,
    "transformer.resblocks.6.mlp.c_fc.weight": 0.531441,
    "transformer.resblocks.11.ln_2.bias": 0.9,
    "ln_final.weight": 1.0,
    "text_projection": 1.0,
    "logit_scale": 1.0,
}


@pytest.mark.parametrize("prefix", ["model.net.", "model.inner.net.", ""])
def test_the_table_of_a_clip_of_12_and_12_blocks(prefix: str):
    found = clip_scales(FAMILIES["open_clip"], prefix, image_decay=0.5, text_decay=0.9)
    assert {name: found[name] for name in TABLE} == pytest.approx(TABLE)
    assert len(set(found.values())) == 13 + 13 + 1


def test_frozen_layers_count_all_the_same():
    whole = clip_scales(FAMILIES["open_clip"], image_decay=0.5)
    last = clip_scales(FAMILIES["open_clip"], frozen=r"resblocks\.\d\.|embedding|conv1|ln_pre", image_decay=0.5)
    assert "visual.transformer.resblocks.11.ln_1.bias" in last and "visual.conv1.weight" not in last
    assert last == {name: whole[name] for name in last}


def test_timms_towers():
    """test_vit has 6 blocks; ConvNeXt-Atto 2 + 2 + 6 + 2 that count on, downsampling with the block that it feeds."""
    vit = clip_scales(FAMILIES["timm"], image_decay=0.5)
    assert vit["visual.trunk.pos_embed"] == vit["visual.trunk.patch_embed.proj.weight"] == 0.5**7
    assert vit["visual.trunk.blocks.0.attn.qkv.weight"] == 0.5**6 and vit["visual.head.proj.weight"] == 1
    convnext = clip_scales(FAMILIES["convnext"], image_decay=0.5)
    by_hand = {"stem.0": 13, "stages.0.blocks.0": 12, "stages.0.blocks.1": 11, "stages.1.downsample.0": 10}
    by_hand |= {"stages.1.blocks.0": 10, "stages.2.blocks.5": 3, "stages.3.downsample.1": 2, "stages.3.blocks.1": 1}
    for start, depth in by_hand.items():
        own = {scale for name, scale in convnext.items() if name.startswith(f"visual.trunk.{start}.")}
        assert own == {0.5**depth}, start


def test_hugging_faces_names():
    """As transformers has them, in open_clip's HFTextEncoder: BERT, DistilBERT, T5's encoder, ModernBERT."""
    names = {
        "embeddings.LayerNorm.weight": 3,
        "encoder.layer.0.attention.self.query.weight": 2,
        "encoder.layer.1.output.dense.bias": 1,
        "pooler.dense.weight": 0,
    }
    assert depths(names) == names
    names = {"embeddings.word_embeddings.weight": 3, "transformer.layer.0.ffn.lin1.bias": 2}
    assert depths({**names, "transformer.layer.1.ffn.lin1.bias": 1}).items() >= names.items()
    names = {"embed_tokens.weight": 2, "block.0.layer.1.DenseReluDense.wo.weight": 1, "final_layer_norm.weight": 0}
    assert depths(names) == names
    names = {"embeddings.norm.weight": 2, "layers.0.mlp.Wi.weight": 1, "final_norm.weight": 0}
    assert depths(names) == names


def depths(names: Iterable[str]) -> dict[str, int]:
    start = "model.net.text.transformer."
    found = places([*(start + name for name in names), "model.net.text.proj.0.weight"])
    assert found.pop("model.net.text.proj.0.weight") == ("text", "head", 0)
    return {name.removeprefix(start): place.depth for name, place in found.items()}


@pytest.mark.parametrize("tower", ["image", "text"])
def test_a_decay_of_one_is_one_rate_and_others_are_refused(tower: str):
    found = clip_scales(FAMILIES["open_clip"], **{f"{tower}_decay": 1.0})
    one = {scale for name, scale in found.items() if name.startswith("visual.") == (tower == "image")}
    assert one == {1.0} and len(set(found.values())) == 14
    with pytest.raises(UserError, match=rf"optim\.{tower}_decay is 0"):
        clip_scales(FAMILIES["open_clip"], **{f"{tower}_decay": 0.0})
