"""The classifier: what it starts from computes what it computed before, and the head is new."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from medclip.models.load import load_clip
from medclip.models.mae import Mae, build_mae, save_mae
from medclip.models.vit import Classifier, build_vit, classifier_from
from medclip.types import UserError

SIZE: dict[str, Any] = {"image_size": 48, "patch_size": 8, "dim": 32, "depth": 2, "heads": 4}
DECODER: dict[str, Any] = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
CLASSES = ["Effusion", "Hernia", "Mass"]
TEXT = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}


def images(n: int = 3, size: int = 48) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def stir(net: nn.Module) -> None:
    """Every parameter apart from its first value."""
    torch.manual_seed(3)
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)


@pytest.fixture
def mae(tmp_path: Path) -> tuple[Mae, str]:
    model = build_mae(**SIZE, **DECODER, mask_ratio=0.75, preprocess={"mean": [0.5] * 3, "std": [0.25] * 3})
    stir(model)
    save_mae(model, tmp_path / "mae.pth")
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"medclip": model.description, "state_dict": state}, tmp_path / "mae.ckpt")
    return model, str(tmp_path / "mae.pth")


def tokens(model: Classifier, batch: dict[str, Any]) -> torch.Tensor:
    """After the last block, before any norm."""
    return model.eval().net.forward_features(model.pixels.normalise_image(batch))


def test_from_mae_the_blocks_compute_what_the_encoder_does(mae, capsys: pytest.CaptureFixture[str]):
    model, path = mae
    found = build_vit(CLASSES, **SIZE, init=path, preprocess={"mean": [0.5] * 3, "std": [0.25] * 3})
    said = capsys.readouterr().err
    assert "not taken: norm, the decoder; new: fc_norm, head" in said
    model.norm = nn.Identity()
    torch.testing.assert_close(tokens(found, {"image": images()}), model.encode({"image": images()}))


def test_logits_are_the_head_on_the_normed_mean_of_the_patches():
    """By hand: the class token is not read."""
    model = build_vit(CLASSES, **SIZE).eval()
    stir(model.net)
    x = tokens(model, {"image": images()})
    pooled = x[:, 1:].mean(1)
    normed = (pooled - pooled.mean(-1, keepdim=True)) / (pooled.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    net: Any = model.net
    by_hand = (normed * net.fc_norm.weight + net.fc_norm.bias) @ net.head.weight.T + net.head.bias
    torch.testing.assert_close(model({"image": images()}), by_hand)


def test_a_checkpoint_brings_its_own_statistics(mae, tmp_path: Path):
    found = build_vit(CLASSES, **SIZE, init=str(tmp_path / "mae.ckpt"))
    assert found.preprocess.mean == (0.5, 0.5, 0.5)
    assert build_vit(CLASSES, **SIZE, init=mae[1]).preprocess.mean == (0.485, 0.456, 0.406)  # a bare file knows none
    stir(found)
    by_hand = {"image": (images() / 255 - 0.5) / 0.25}
    torch.testing.assert_close(found.eval()({"image": images()}), found(by_hand))
    rows = {"image": images(), "mean": torch.full((3, 3), 0.3), "std": torch.full((3, 3), 0.7)}
    torch.testing.assert_close(found(rows), found({"image": (images() / 255 - 0.3) / 0.7}))


def test_positions_are_resized_to_another_image_size(mae):
    model, path = mae
    found = build_vit(CLASSES, **SIZE | {"image_size": 64}, init=path)
    net: Any = found.net
    assert net.pos_embed.shape == (1, 65, 32)
    assert torch.equal(net.pos_embed[:, 0], model.pos_embed[:, 0])
    assert found.preprocess.size == (64, 64)
    assert found({"image": images(2, 64)}).shape == (2, 3)


@pytest.mark.parametrize("quick", [False, True])
def test_from_a_clip_the_blocks_compute_what_its_tower_does(quick, tmp_path: Path):
    """open_clip's own ViT: pre-norm, no bias in the patch embedding, eps 1e-5, and OpenAI's GELU where it has it."""
    vision = {"image_size": 48, "patch_size": 8, "layers": 2, "width": 32, "head_width": 8}
    cfg = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT, "quick_gelu": quick}
    clip = load_clip(cfg)
    stir(clip.net)
    state = {f"model.net.{key}": value for key, value in clip.net.state_dict().items()}
    torch.save({"medclip": clip.description, "state_dict": state}, tmp_path / "clip.ckpt")
    found = build_vit(CLASSES, **SIZE, init=str(tmp_path / "clip.ckpt"))
    assert found.preprocess.mean == clip.preprocess.mean
    seen = []
    clip.net.visual.transformer.register_forward_hook(lambda module, given, out: seen.append(out))
    clip.eval().encode_image(images())
    torch.testing.assert_close(tokens(found, {"image": images()}), seen[0], rtol=1e-4, atol=1e-5)


def test_from_another_classifier_all_but_the_head(tmp_path: Path):
    first = build_vit(["a"], **SIZE, drop_path=0.1)
    stir(first)
    state = {f"model.{key}": value for key, value in first.state_dict().items()}
    torch.save({"medclip": first.description, "state_dict": state}, tmp_path / "best.ckpt")
    found = build_vit(CLASSES, **SIZE, init=str(tmp_path / "best.ckpt"))
    for key, value in found.net.state_dict().items():
        if not key.startswith("head."):
            assert torch.equal(value, first.net.state_dict()[key]), key
    assert found.net.head.weight.shape == (3, 32)


def test_the_head_starts_undecided():
    """std 2e-5: every probability is 1/2 at first, whatever the image."""
    torch.manual_seed(0)
    model = build_vit(CLASSES * 1, **SIZE | {"dim": 512}).eval()
    assert model.net.head.weight.std().item() == pytest.approx(2e-5, rel=0.05)
    assert model({"image": images()}).sigmoid().detach().numpy() == pytest.approx(0.5, abs=1e-3)


def test_drop_path_rises_to_its_rate_and_a_probe_has_none():
    rates = [
        getattr(block.drop_path1, "drop_prob", 0.0) for block in build_vit(CLASSES, **SIZE, drop_path=0.2).net.blocks
    ]
    assert rates == pytest.approx([0.0, 0.2])
    probe = build_vit(CLASSES, **SIZE, drop_path=0.2, probe=True).train()
    assert torch.equal(probe({"image": images()}), probe({"image": images()}))


def test_a_probe_trains_the_head_alone(mae):
    model = build_vit(CLASSES, **SIZE, init=mae[1], probe=True)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"net.head.weight", "net.head.bias"}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0)
    model({"image": images()}).sum().backward()
    optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"net.head.weight", "net.head.bias"}


def test_description_makes_the_same_model_again():
    model = build_vit(CLASSES, **SIZE, drop_path=0.1, preprocess={"mean": [0.5] * 3, "std": [0.25] * 3}).eval()
    stir(model)
    other = classifier_from(model.description).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other({"image": images()}), model({"image": images()}))
    assert (other.classes, other.preprocess) == (CLASSES, model.preprocess)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"depth": 3}, r"lacks blocks\.2"),
        ({"depth": 1}, r"surplus blocks\.1"),
        ({"dim": 64}, r"of \(1, 1, 32\) instead of \(1, 1, 64\)"),
        ({"heads": 5}, "multiple of heads=5"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"image_size": 50}, "no multiple of patch_size"),
        ({"classes": ["a", "a"]}, "each class once"),
        ({"classes": []}, "no classes"),
        ({"classes": None}, r"no classes.*data\.labels"),
        ({"layers": 2}, r"model\.layers is unknown"),
    ],
)
def test_what_does_not_fit_is_named(change, says, mae):
    with pytest.raises(UserError, match=says):
        build_vit(**{"classes": CLASSES, **SIZE, "init": mae[1], **change})


def test_other_heads_are_refused_where_the_source_says_them(mae, tmp_path: Path):
    """The weights would fit, and compute something else."""
    with pytest.raises(UserError, match=r"4 heads, model\.heads is 8"):
        build_vit(CLASSES, **SIZE | {"heads": 8}, init=str(tmp_path / "mae.ckpt"))


def test_a_clip_without_a_vit_is_refused():
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
    cfg = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT}
    with pytest.raises(UserError, match="no plain ViT"):
        build_vit(CLASSES, **SIZE, init={"architecture": cfg})
