"""Locking: what is free by hand, for every family of towers; what is frozen does not move, nor costs activations."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from medclip.models.clip import Clip
from medclip.models.load import load_clip
from medclip.models.lock import lock
from medclip.types import UserError

TEXT = {"context_length": 16, "vocab_size": 64, "layers": 2, "width": 16, "heads": 2}
TIMM = {"image_size": 32, "timm_proj": "linear", "timm_pool": "avg"}
BLOCK = {"ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"} | {
    *("attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias"),
    *("mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"),
}


def clip_of(vision: dict, **options: object) -> Clip:
    torch.manual_seed(0)
    return load_clip({"embed_dim": 16, "vision_cfg": vision, "text_cfg": dict(TEXT), **options})


def free(clip: Clip, start: str = "") -> set[str]:
    return {n.removeprefix(start) for n, p in clip.net.named_parameters() if p.requires_grad and n.startswith(start)}


def step(clip: Clip, steps: int = 1) -> None:
    """Training steps whose gradients reach everything that is free."""
    optimizer = torch.optim.SGD([p for p in clip.parameters() if p.requires_grad], lr=0.1)
    clip.train()
    for i in range(steps):
        torch.manual_seed(i)
        image, text = torch.randn(4, 3, *clip.preprocess.size), torch.randint(5, 25, (4, clip.tokenizer.context_length))
        out = clip({"image": image, "text": text})
        logits = out.logit_scale * out.image_features @ out.text_features.T
        nn.functional.cross_entropy(logits, torch.arange(4)).backward()
        optimizer.step()
        optimizer.zero_grad()


def moved(clip: Clip, act: Callable[[Clip], None]) -> set[str]:
    """Names in the state dict, buffers too, whose values change."""
    before = copy.deepcopy(clip.net.state_dict())
    act(clip)
    return {name for name, value in clip.net.state_dict().items() if not torch.equal(value, before[name])}


def block(prefix: str) -> set[str]:
    return {f"{prefix}.{name}" for name in BLOCK}


# Open_clip's own ViT and text transformer, by hand


@pytest.mark.parametrize(
    "blocks, head, expected",
    [
        (0, None, set()),
        (0, True, {"proj", "ln_post.weight", "ln_post.bias"}),
        (1, None, {"proj", "ln_post.weight", "ln_post.bias"} | block("transformer.resblocks.1")),
        (
            2,
            None,
            {"proj", "ln_post.weight", "ln_post.bias"}.union(*(block(f"transformer.resblocks.{i}") for i in (0, 1))),
        ),
    ],
)
def test_image_tower_of_open_clip(vit_cfg: dict, blocks: int, head: bool | None, expected: set[str]):
    clip = load_clip(vit_cfg)
    text = free(clip) - {f"visual.{name}" for name in free(clip, "visual.")}
    lock(clip, "image", blocks, head)
    assert free(clip, "visual.") == expected
    assert free(clip) - {f"visual.{name}" for name in expected} == text  # the text tower and the scale as they were


def test_text_tower_of_clip():
    clip = lock(clip_of({"image_size": 32, "patch_size": 16, "layers": 1, "width": 32, "head_width": 16}), "text", 1)
    head = {"text_projection", "ln_final.weight", "ln_final.bias"}
    found = {name for name in free(clip) if not name.startswith("visual.")}
    assert found == head | block("transformer.resblocks.1") | {"logit_scale"}


def test_text_tower_of_siglip(siglip_cfg: dict):
    clip = lock(load_clip(siglip_cfg), "text", head=True)
    assert free(clip, "text.") == {"text_projection.weight", "text_projection.bias", "ln_final.weight", "ln_final.bias"}
    assert {"logit_scale", "logit_bias"} <= free(clip)


# Where open_clip 3.3 gives up: BERT with its last layers free (KeyError: 'layer_attr'), ResNets


def test_bert_with_its_last_layer_free_trains_that_layer_and_the_projection(bert_cfg: dict):
    clip = lock(lock(load_clip(bert_cfg), "text", 1), "image")
    found = moved(clip, step)
    layer = {name for name in clip.net.state_dict() if "encoder.layer.1." in name}
    assert len(layer) == 16
    # A bias of the keys shifts all of a softmax's logits alike: its gradient is 0 but for rounding.
    keys = "text.transformer.encoder.layer.1.attention.self.key.bias"
    assert found - {keys} == (layer - {keys}) | {"text.proj.0.weight", "text.proj.2.weight", "logit_scale"}


def test_bert_frozen_whole(bert_cfg: dict):
    clip = lock(load_clip(bert_cfg), "text")
    assert free(clip, "text.") == set()
    assert free(lock(load_clip(bert_cfg), "text", head=True), "text.") == {"proj.0.weight", "proj.2.weight"}
    with pytest.raises(UserError, match=r"lock_text\.blocks is 3, but the text tower has 2: give 0 to 2"):
        lock(clip, "text", 3)


@pytest.mark.parametrize(
    "vision, blocks, kept",
    [
        (
            {"layers": [1, 1, 2, 1], "width": 8, "head_width": 8, "image_size": 64},
            2,
            ("attnpool", "layer4.0", "layer3.1"),
        ),
        (TIMM | {"timm_model_name": "resnet10t"}, 1, ("head", "trunk.layer4.0")),
        (TIMM | {"timm_model_name": "convnext_atto"}, 1, ("head", "trunk.head.norm", "trunk.stages.3.blocks.1")),
        (
            TIMM | {"timm_model_name": "fastvit_t8"},
            3,
            ("head", "trunk.final_conv", *(f"trunk.stages.{s}" for s in ("3", "2.blocks.3"))),
        ),
        (TIMM | {"timm_model_name": "test_vit"}, 1, ("head", "trunk.norm", "trunk.fc_norm", "trunk.blocks.5")),
    ],
    ids=["resnet", "timm-resnet", "convnext", "fastvit", "timm-vit"],
)
def test_other_towers(vision: dict, blocks: int, kept: tuple[str, ...]):
    """Free is what stands under the last blocks' and the head's names, and nothing else moves: no batch norm either."""
    clip = lock(clip_of(vision), "image", blocks)
    names = [name.removeprefix("visual.") for name in clip.net.state_dict() if name.startswith("visual.")]
    mine = {name for name in names if name.startswith(tuple(f"{start}." for start in kept))}
    parameters = {name for name, _ in clip.net.visual.named_parameters()}
    assert free(clip, "visual.") == mine & parameters
    found = {name.removeprefix("visual.") for name in moved(clip, step) if name.startswith("visual.")}
    assert found and found <= mine
    assert any("running_mean" in name for name in found) == any("running_mean" in name for name in mine)


# What is locked stands still and costs nothing


@pytest.mark.parametrize("tower, prefix", [("image", "visual."), ("text", "text.")])
def test_a_locked_tower_is_the_same_to_the_bit_after_three_steps(siglip_cfg: dict, tower, prefix: str):
    clip = lock(load_clip(siglip_cfg), tower)
    found = moved(clip, lambda it: step(it, 3))
    assert found and not any(name.startswith(prefix) for name in found)


def kept_bytes(clip: Clip, tower: str) -> int:
    """Of activations that autograd keeps for the backward pass, parameters left out."""
    own, sizes = {p.data_ptr() for p in clip.parameters()}, []

    def pack(x: torch.Tensor) -> torch.Tensor:
        sizes.append(0 if x.data_ptr() in own else x.numel() * x.element_size())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        if tower == "image":
            clip.net.encode_image(torch.randn(4, 3, 32, 32))
        else:
            clip.net.encode_text(torch.randint(5, 25, (4, clip.tokenizer.context_length)))
    return sum(sizes)


def test_activations_are_kept_from_the_first_free_block_on(bert_cfg: dict):
    for tower in ("image", "text"):
        whole, half, none = (
            kept_bytes(clip.train(), tower)
            for clip in (load_clip(bert_cfg), lock(load_clip(bert_cfg), tower, 1), lock(load_clip(bert_cfg), tower))
        )
        assert none == 0 and 0.3 * whole < half < 0.7 * whole


def test_dropout_and_batch_norm_of_what_is_locked_stay_off_after_train(bert_cfg: dict):
    """BERT has dropout of 0.1 in every layer and its embeddings."""
    clip = lock(load_clip(bert_cfg), "text", 1).eval().train()
    bert = clip.net.text.transformer
    assert clip.training and not bert.embeddings.dropout.training
    on = [layer.attention.output.dropout.training for layer in bert.encoder.layer]
    assert on == [False, True]
    assert copy.deepcopy(clip).train().net.text.transformer.embeddings.training is False
    text = torch.randint(5, 25, (2, 24))
    whole = lock(load_clip(bert_cfg), "text").train()
    assert torch.equal(whole.encode_text(text), whole.encode_text(text))
    assert not torch.equal(clip.encode_text(text), clip.encode_text(text))


@pytest.mark.parametrize(
    "vision, words, message",
    [
        ({"layers": 1, "width": 32, "image_size": 32, "head_width": 16}, {"blocks": 2}, r"has 1: give 0 to 1"),
        (TIMM | {"timm_model_name": "regnetx_002"}, {"blocks": 1}, r"blocks of this image tower are not known"),
        (TIMM | {"timm_model_name": "regnetx_002"}, {"head": True}, r"blocks of this image tower are not known"),
        ({"layers": 1, "width": 32, "image_size": 32, "head_width": 16}, {"blocks": -1}, r"0 or more"),
        ({"layers": 1, "width": 32, "image_size": 32, "head_width": 16}, {"blocks": 1, "head": False}, r"head=false"),
    ],
)
def test_what_cannot_be_locked_so_is_one_line(vision: dict, words: dict, message: str):
    with pytest.raises(UserError, match=rf"adapt\.lock_image.*{message}"):
        lock(clip_of(vision), "image", **words)


def test_what_cannot_be_counted_can_be_frozen_whole():
    assert free(lock(clip_of(TIMM | {"timm_model_name": "regnetx_002"}), "image"), "visual.") == set()
