"""Attention rollout against weights that the modules give themselves, and against cases with a known answer."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from medclip.infer.attention import attention_layers, attention_map, attention_weights, pooling, rollout
from medclip.models.build import build_net


def vit(**options: object) -> VisionTransformer:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 2}
    return VisionTransformer(**sizes | options).eval()  # type: ignore[arg-type]


def clip_tower() -> nn.Module:
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "layers": 2, "width": 32, "head_width": 8}
    text = {"context_length": 8, "vocab_size": 64, "layers": 1, "width": 16, "heads": 2}
    net = build_net({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text})
    return net.visual.eval()  # type: ignore[union-attr, operator]


def images(count: int = 2, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_weights_of_timm_are_those_of_its_unfused_path() -> None:
    layer = vit(qk_norm=True, depth=1).blocks[0].attn
    seen: list[Tensor] = []
    layer.fused_attn = False
    layer.attn_drop.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    tokens = torch.randn(2, 7, 32)
    layer(tokens)
    torch.testing.assert_close(attention_weights(layer, tokens), seen[0].mean(dim=1))


@pytest.mark.parametrize("batch_first", [True, False])
def test_weights_of_torch_are_those_it_returns(batch_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(24, 3, batch_first=batch_first).eval()
    tokens = torch.randn(2, 5, 24)
    fed = tokens if batch_first else tokens.transpose(0, 1)
    _, own = layer(fed, fed, fed, need_weights=True)
    torch.testing.assert_close(attention_weights(layer, tokens), own)


def test_rollout_by_hand() -> None:
    one = torch.tensor([[[0.5, 0.5], [0.0, 1.0]]])
    two = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    # (A + I) / 2 of each: [[.75, .25], [0, 1]] and [[1, 0], [.5, .5]]; the later one stands on the left.
    want = torch.tensor([[1.0, 0.0], [0.5, 0.5]]) @ torch.tensor([[0.75, 0.25], [0.0, 1.0]])
    torch.testing.assert_close(rollout([one, two])[0], want)


@torch.inference_mode()
def test_the_map_of_a_tower_is_the_product_over_its_blocks() -> None:
    tower, batch = vit(global_pool="token"), images()
    inputs: list[tuple[nn.Module, Tensor]] = []
    for layer in attention_layers(tower):
        layer.register_forward_hook(lambda module, args, out: inputs.append((module, args[0])))
    got = attention_map(tower, tower, batch)
    assert got is not None and len(inputs) == 3
    by_hand = torch.eye(17)
    for layer, tokens in inputs:
        by_hand = (attention_weights(layer, tokens) + torch.eye(17)) / 2 @ by_hand
    torch.testing.assert_close(got.flatten(1), by_hand[:, 0, 1:])
    mean = attention_map(tower, tower, batch, pool="mean")
    assert mean is not None
    torch.testing.assert_close(mean.flatten(1), by_hand[:, 1:, 1:].mean(dim=1))


@pytest.mark.parametrize("tower", [vit(), vit(class_token=False, global_pool="avg"), clip_tower()], ids=range(3))
def test_uniform_attention_gives_a_flat_map(tower: nn.Module) -> None:
    for layer in attention_layers(tower):
        for name, parameter in layer.named_parameters():
            if "qkv" in name or "in_proj" in name:
                nn.init.zeros_(parameter)
    got = attention_map(tower, tower, images())
    assert got is not None and got.shape == (2, 4, 4)
    torch.testing.assert_close(got, got[:, :1, :1].expand_as(got))


def test_attention_to_one_patch_is_found_there() -> None:
    """A query that fits one position alone, whatever the picture, puts the map's peak at that patch."""
    tower = vit(depth=1, class_token=True, global_pool="token", pos_embed="learn")
    layer = tower.blocks[0].attn
    with torch.no_grad():
        tower.pos_embed.zero_()
        tower.pos_embed[0, 1 + 6, 0] = 300.0  # patch in row 1, column 2
        layer.qkv.weight.zero_()
        layer.qkv.bias.zero_()
        layer.qkv.bias[0::8][:4] = 6.0  # every query looks along each head's first axis
        for head in range(4):
            layer.qkv.weight[32 + 8 * head, 0] = 6.0  # and keys have the embedding's first channel there
    got = attention_map(tower, tower, images())
    assert got is not None
    assert got.flatten(1).argmax(dim=1).tolist() == [6, 6]
    assert got[:, 1, 2] == pytest.approx(0.5, abs=1e-3)  # half by attention; the residual keeps the rest on the token


def test_what_is_pooled_is_asked_of_the_tower() -> None:
    assert pooling(vit(global_pool="avg")) == "mean" and pooling(vit(global_pool="token")) == "token"
    assert pooling(clip_tower()) == "token"


def test_towers_without_plain_attention_have_no_map() -> None:
    for tower in (
        timm.create_model("resnet18", num_classes=2).eval(),
        timm.create_model("swin_tiny_patch4_window7_224", img_size=56, window_size=7, num_classes=2).eval(),
        vit(patch_drop_rate=0.5).train(),
    ):
        size = 56 if hasattr(tower, "layers") else 32
        assert attention_map(tower, tower, images(size=size)) is None


def test_no_hook_stays_behind() -> None:
    tower = vit()
    attention_map(tower, tower, images())
    with pytest.raises(RuntimeError):
        attention_map(tower, tower, torch.randn(1, 4, 32, 32))  # cannot run
    assert all(not layer._forward_pre_hooks for layer in attention_layers(tower))
