"""LoRA: what is trained, by hand; the first model is the loaded one; loaded again, the adapters are in the weights."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from medclip.models.any import load_any
from medclip.models.clip import Clip
from medclip.models.load import load_clip
from medclip.models.lora import lora
from medclip.models.merge import merged
from medclip.models.split_attention import SplitAttention
from medclip.types import UserError
from tests.models.test_lock import TIMM, clip_of, free, moved, step

OPEN_CLIP = ("attn.fused_in_proj", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
BERT = (
    *(f"attention.self.{name}" for name in ("query", "key", "value")),
    *("attention.output.dense", "intermediate.dense", "output.dense"),
)


def factors(block: str, layers: tuple[str, ...]) -> set[str]:
    return {f"{block}.{layer}.lora_{factor}.default.weight" for layer in layers for factor in "AB"}


def outputs(clip: Clip) -> torch.Tensor:
    """Logits of three images and texts."""
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(3, 3, *clip.preprocess.size, generator=generator)
    text = torch.randint(5, 25, (3, clip.tokenizer.context_length), generator=generator)
    with torch.no_grad():
        out = clip.eval()({"image": image, "text": text})
    return out.logit_scale * out.image_features @ out.text_features.T + (out.logit_bias or 0)


def perturb(clip: Clip) -> Clip:
    """As if after training: no factor is zero."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in clip.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return clip


def saved(clip: Clip, path: Path) -> str:
    state = {f"model.{key}": value for key, value in clip.state_dict().items()}
    torch.save({"state_dict": state, "medclip": clip.description}, path)
    return str(path)


@pytest.mark.parametrize("towers", ["both", "image", "text"])
def test_trained_are_the_factors_of_every_linear_layer_of_the_blocks_and_the_scale(bert_cfg: dict, towers: str):
    clip = lora(load_clip(bert_cfg), towers=towers)  # type: ignore[arg-type]
    image = set().union(*(factors(f"visual.transformer.resblocks.{i}", OPEN_CLIP) for i in (0, 1)))
    text = set().union(*(factors(f"text.transformer.encoder.layer.{i}", BERT) for i in (0, 1)))
    assert free(clip) == {"both": image | text, "image": image, "text": text}[towers] | {"logit_scale"}


def test_targets_and_free_are_patterns(vit_cfg: dict):
    clip = lora(load_clip(vit_cfg), targets=["*.c_fc", "visual.*.1.attn.*"], free=["visual.proj", "*.ln_post.*"])
    expected = {"visual.proj", "visual.ln_post.weight", "visual.ln_post.bias"}
    for block in ("visual.transformer.resblocks.0", "visual.transformer.resblocks.1", "transformer.resblocks.0"):
        expected |= factors(block, ("mlp.c_fc",))
    assert free(clip) == expected | factors("visual.transformer.resblocks.1", OPEN_CLIP[:2])


def test_timms_names_and_convolutions():
    clip = lora(clip_of(TIMM | {"timm_model_name": "test_vit"}), towers="image")
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert free(clip) == set().union(*(factors(f"visual.trunk.blocks.{i}", layers) for i in range(6))) | {"logit_scale"}
    resnet = lora(clip_of(TIMM | {"timm_model_name": "resnet10t"}), towers="image", targets=["*.layer4.*.conv?"])
    assert free(resnet) == factors("visual.trunk.layer4.0", ("conv1", "conv2")) | {"logit_scale"}


def test_the_first_model_is_the_loaded_one_and_nothing_frozen_moves(any_cfg: dict):
    clip = load_clip(any_cfg)
    before = outputs(clip)
    lora(clip, rank=2)
    torch.testing.assert_close(outputs(clip), before, atol=1e-5, rtol=0)
    trained = free(clip) - {"logit_scale", "logit_bias"}
    found = moved(clip, lambda it: step(it, 3))
    assert found - {"logit_scale"} <= trained
    # At first B is 0, so that A has no gradient; after one step all have.
    assert {name for name in found if ".lora_A." in name} == {name for name in trained if ".lora_A." in name}


def test_gradients_of_the_factors_are_those_of_the_formula():
    """With G the gradient of W' = W + s B A: dL/dB = s G A^T and dL/dA = s B^T G, attention's fused matrix included."""
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 16, "layers": 1, "width": 32, "head_width": 16}
    clip = perturb(lora(clip_of(vision), rank=2, alpha=3))
    plain = clip_of(vision).eval()
    block, name = "visual.transformer.resblocks.0.attn", "fused_in_proj"
    own = dict(clip.net.named_parameters())
    plain.net.load_state_dict(merged(clip.net.state_dict(), clip.description["lora"], "here"))
    image = torch.randn(4, 3, 32, 32)
    for it in (clip.eval(), plain):
        it.encode_image(image)[:, 0].sum().backward()
    a, b = (own[f"{block}.{name}.lora_{factor}.default.weight"] for factor in "AB")
    g = plain.net.get_parameter(f"{block}.in_proj_weight").grad
    assert g is not None and a.grad is not None and b.grad is not None and a.shape == (2, 32) and b.shape == (96, 2)
    torch.testing.assert_close(b.grad, 1.5 * g @ a.T, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(a.grad, 1.5 * b.T @ g, atol=1e-5, rtol=1e-4)


def test_loaded_again_it_is_a_plain_clip_of_the_same_logits(any_cfg: dict, tmp_path: Path, monkeypatch):
    base = load_clip(any_cfg)
    clip = load_clip(any_cfg)
    clip.net.load_state_dict(base.net.state_dict())
    perturb(lora(clip, rank=2, alpha=3))
    path = saved(clip, tmp_path / "x.ckpt")
    monkeypatch.setitem(sys.modules, "peft", None)  # whoever evaluates needs no peft
    again = load_clip(pretrained=path)
    assert "lora" not in again.description and again.net.state_dict().keys() == base.net.state_dict().keys()
    assert (outputs(clip) - outputs(base)).abs().max() > 0.1
    torch.testing.assert_close(outputs(again), outputs(clip), atol=1e-5, rtol=0)
    assert isinstance(load_any(pretrained=f"random:{path}"), Clip)
    # What was learnt is of rank 2 in every layer that has adapters, and nothing elsewhere.
    for key, value in base.net.state_dict().items():
        difference = again.net.state_dict()[key] - value
        if key.endswith((".weight", "_weight")) and value.ndim == 2 and ("resblocks" in key or "encoder.layer" in key):
            assert torch.linalg.matrix_rank(difference, atol=1e-4) == 2, key
        elif "logit" not in key:
            assert not difference.any(), key


def test_convolutions_merge(tmp_path: Path):
    clip = clip_of(TIMM | {"timm_model_name": "resnet10t"})
    perturb(lora(clip, towers="image", targets=["*.layer4.*.conv?", "*.layer3.*.downsample.1"], rank=3))
    torch.testing.assert_close(outputs(load_clip(pretrained=saved(clip, tmp_path / "x.ckpt"))), outputs(clip))


def test_split_attention_is_torchs_and_with_adapters_torchs_of_the_summed_weights():
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    reference = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    nn.init.normal_(reference.in_proj_bias)
    holder = nn.ModuleDict({"attn": SplitAttention(copy.deepcopy(reference))}).eval()
    x, mask = torch.randn(3, 5, 16), torch.full((5, 5), -torch.inf).triu(1)

    def same() -> None:
        for wanted in (None, mask, mask.expand(6, 5, 5)):
            expected = reference(x, x, x, need_weights=False, attn_mask=wanted)[0]
            torch.testing.assert_close(holder["attn"](x, x, x, attn_mask=wanted)[0], expected)

    same()
    layers = ["attn.fused_in_proj", "attn.out_proj"]
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=4, target_modules=layers), holder)
    for layer, weight in (("fused_in_proj", reference.in_proj_weight), ("out_proj", reference.out_proj.weight)):
        a, b = (holder.get_parameter(f"attn.{layer}.lora_{factor}.default.weight") for factor in "AB")
        nn.init.normal_(b)
        with torch.no_grad():
            weight += 2 * b @ a
    same()


def test_dropout_of_the_adapters_and_stillness_of_the_rest(bert_cfg: dict):
    clip = lora(load_clip(bert_cfg), dropout=0.5).train()
    layer = clip.net.text.transformer.encoder.layer[0]
    assert layer.attention.self.query.lora_dropout["default"].training
    assert not clip.net.text.transformer.embeddings.dropout.training
    resnet = lora(clip_of(TIMM | {"timm_model_name": "resnet10t"}), towers="text")
    assert not any(name.startswith("visual.") for name in moved(resnet, step))  # nor its running statistics


@pytest.mark.parametrize(
    "words, message",
    [
        ({"rank": 0}, r"lora\.rank is 0"),
        ({"alpha": 0}, r"alpha 0: .* above 0"),
        ({"dropout": 1}, r"lora\.dropout is 1"),
        ({"towers": "images"}, r"towers=images: choose one of both, image, text"),
        (
            {"targets": ["*.attention.*"]},
            r"lora\.targets: '\*\.attention\.\*' fits no layer; some are visual\.transformer\.resblocks\.0\.attn",
        ),
        ({"free": ["visual.projection"]}, r"lora\.free: 'visual\.projection' fits no parameter"),
    ],
)
def test_what_the_user_said_wrongly_is_one_line(vit_cfg: dict, words: dict, message: str):
    with pytest.raises(UserError, match=message) as error:
        lora(load_clip(vit_cfg), **words)
    assert "\n" not in str(error.value)


def test_what_cannot_be_is_one_line(vit_cfg: dict, tmp_path: Path, monkeypatch):
    with pytest.raises(UserError, match=r"adapters already"):
        lora(lora(load_clip(vit_cfg)))
    with pytest.raises(UserError, match=r"no block of towers=image has a linear layer"):
        lora(clip_of(TIMM | {"timm_model_name": "resnet10t"}), towers="image")
    clip = lora(load_clip(vit_cfg))
    clip.description["lora"]["rank"] = 0
    with pytest.raises(UserError, match=r"the adapters in .*x\.ckpt do not fit its weights"):
        load_clip(pretrained=saved(clip, tmp_path / "x.ckpt"))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"adapt=\[lora\] needs peft: pip install"):
        lora(load_clip(vit_cfg))
