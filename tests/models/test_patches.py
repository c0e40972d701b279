"""Encoders of patches: preprocessing as open_clip's and timm's own transforms do it, features as the models' own."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform

from medclip.data.decode import read_image
from medclip.models.folder import write_folder
from medclip.models.load import load_clip
from medclip.models.patches import PatchEncoder, clip_encoder, short_name, timm_encoder
from medclip.types import Preprocess, UserError
from tests.slides.toys import toy_pixels

VIT = "test_vit.r160_in1k"  # 0.4 M parameters; 160 pixels, crop 0.95


@pytest.fixture(scope="module")
def patches() -> np.ndarray:
    """Tissue with cells and noise, uint8 (6, 256, 256, 3)."""
    pixels = toy_pixels(1000, 800, seed=3)[0]
    rng = np.random.default_rng(0)
    found = np.stack([pixels[y : y + 256, x : x + 256] for x, y in rng.integers(0, (740, 540), (6, 2))]).astype(int)
    y, x = np.mgrid[:256, :256]
    for patch in found:
        for cx, cy, r in zip(*rng.uniform(0, 256, (2, 60)), rng.uniform(2, 9, 60), strict=True):
            patch[(x - cx) ** 2 + (y - cy) ** 2 < r * r] -= (60, 70, 20)
    return np.clip(found + rng.normal(0, 4, found.shape), 0, 255).astype(np.uint8)


class Seen(torch.nn.Module):
    """Gives the image that it is fed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)


def fed(preprocess: Preprocess, patches: np.ndarray, crop: float = 1.0) -> torch.Tensor:
    """What a model sees, (b, 3, h, w)."""
    net = Seen()
    seen = PatchEncoder("x", net, net, preprocess, crop=crop)(patches)
    return torch.from_numpy(seen).view(len(patches), 3, *preprocess.size)


def levels_off(ours: torch.Tensor, theirs: torch.Tensor, std: Any) -> tuple[float, float]:
    """Largest and mean difference in grey levels of 255."""
    off = (ours - theirs).abs() * torch.tensor(std).view(1, 3, 1, 1) * 255
    return float(off.max()), float(off.mean())


@pytest.mark.parametrize("side", [256, 224, 96])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_open_clip_s_own_transform(patches: np.ndarray, side: int, mode: Any, interpolation: Any) -> None:
    preprocess = Preprocess(size=(224, 224), resize_mode=mode, interpolation=interpolation)
    patches = np.ascontiguousarray(patches[:, :side, :side])
    transform = open_clip.image_transform(
        (224, 224), is_train=False, mean=preprocess.mean, std=preprocess.std, resize_mode=mode,
        interpolation=interpolation,
    )  # fmt: skip
    theirs = torch.stack([transform(Image.fromarray(patch)) for patch in patches])  # type: ignore[operator,arg-type]
    most, mean = levels_off(fed(preprocess, patches), theirs, preprocess.std)
    assert most < 2.01 and mean < 0.1  # Pillow rounds after each of two passes


@pytest.mark.parametrize("crop", [1.0, 0.95, 0.9, 0.875])
@pytest.mark.parametrize("size", [224, 160])
def test_timm_s_own_transform(patches: np.ndarray, crop: float, size: int) -> None:
    """timm rounds 224 / 0.9 down: a pixel more would shift the whole picture."""
    preprocess = Preprocess(size=(size, size), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    transform = create_transform(
        (3, size, size), is_training=False, interpolation="bicubic", mean=preprocess.mean, std=preprocess.std,
        crop_pct=crop,
    )  # fmt: skip
    theirs = torch.stack([transform(Image.fromarray(patch)) for patch in patches])  # type: ignore[operator,arg-type]
    most, mean = levels_off(fed(preprocess, patches, crop), theirs, preprocess.std)
    assert most < 2.01 and mean < 0.1


def test_patches_of_the_model_s_size_are_not_resized(patches: np.ndarray) -> None:
    preprocess = Preprocess(size=(256, 256), mean=(0.0,) * 3, std=(1.0,) * 3)
    seen = fed(preprocess, patches) * 255
    assert np.abs(seen.permute(0, 2, 3, 1).numpy() - patches).max() < 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    cfg = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 96, "patch_size": 32, "layers": 2, "width": 64, "head_width": 32},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "layers": 1, "width": 32, "heads": 2},
    }
    path = tmp_path_factory.mktemp("models") / "mine"
    write_folder(load_clip(cfg), path, title="toy")
    return path


@pytest.mark.parametrize("side", [96, 256])
def test_a_clip_s_features_are_its_image_tower_s(patches: np.ndarray, folder: Path, side: int) -> None:
    encoder = clip_encoder(str(folder))
    patches = np.ascontiguousarray(patches[:, :side, :side])
    clip = load_clip(pretrained=str(folder)).eval()
    images = []
    for patch in patches:
        png = io.BytesIO()
        Image.fromarray(patch).save(png, "png")
        images.append(torch.from_numpy(read_image(png.getvalue(), clip.preprocess, exact=True).copy()))
    with torch.no_grad():
        expected = clip.encode_image(torch.stack(images).permute(0, 3, 1, 2)).numpy()
    features = encoder(patches)
    assert features.dtype == np.float32 and features.shape == (6, 32) and encoder.name == "mine"
    assert np.allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)
    assert (features * expected).sum(axis=1).min() > (0.99999 if side == 96 else 0.9999)
    assert np.allclose(encoder(patches[2:3])[0], features[2], atol=1e-5)  # whatever else is in the batch


def test_a_timm_model_s_features_are_those_before_its_classifier(patches: np.ndarray, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = timm.create_model(VIT, pretrained=False).eval()
    transform = create_transform(**resolve_model_data_config(net), is_training=False)
    images = torch.stack([transform(Image.fromarray(patch)) for patch in patches])  # type: ignore[operator,arg-type]
    with torch.no_grad():
        expected = net.forward_head(net.forward_features(images), pre_logits=True).numpy()  # type: ignore[operator]
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        encoder = timm_encoder(VIT, weights=str(tmp_path / name))
        features = encoder(patches)
        scale = np.abs(expected).mean()
        assert features.shape == expected.shape and np.abs(features - expected).mean() < 0.02 * scale
    assert encoder.name == VIT and timm_encoder(VIT, pretrained=False, name="a b/c").name == "a-b-c"


def test_weights_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    state = timm.create_model(VIT, pretrained=False).state_dict()
    key = "blocks.0.attn.qkv.weight"
    cases = {
        "lacks.pt": {k: v for k, v in state.items() if k != key},
        "shape.pt": state | {key: torch.zeros(3, 3)},
    }
    for name, content in cases.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "text.pt").write_text("no weights")
    for name, says in (
        ("lacks.pt", f"lacks 1 of the model's tensors, e.g. {key}"),
        ("shape.pt", rf"{key} is \(3, 3\), not \("),
        ("text.pt", "cannot read weights"),
        ("gone.pt", "gone.pt"),
        ("weights.txt", "no file of weights"),
    ):
        with pytest.raises(UserError, match=says) as error:
            timm_encoder(VIT, weights=str(tmp_path / name))
        assert "\n" not in str(error.value) and name in str(error.value)


def test_unknown_models_and_precisions_are_one_line(folder: Path) -> None:
    for wrong in (
        lambda: timm_encoder("vit_enormous_patch16", pretrained=False),
        lambda: timm_encoder(VIT, pretrained=False, colour="red"),
        lambda: clip_encoder(str(folder), precision="fp8"),  # type: ignore[arg-type]
        lambda: clip_encoder(str(folder / "gone")),
    ):
        with pytest.raises(UserError) as error:
            wrong()
        assert "\n" not in str(error.value)


def test_bf16_is_near_and_still_float32(patches: np.ndarray, folder: Path) -> None:
    full, half = (clip_encoder(str(folder), precision=p)(patches) for p in ("fp32", "bf16"))
    assert half.dtype == np.float32 and not np.array_equal(full, half)
    assert (full * half).sum(axis=1).min() > 0.999


def test_two_models_of_a_name_have_two_fingerprints(folder: Path, tmp_path: Path) -> None:
    one, again = clip_encoder(str(folder)), clip_encoder(str(folder), name="other")
    assert one.fingerprint == again.fingerprint  # weights and preprocessing, not names
    clip = load_clip(pretrained=str(folder))
    with torch.no_grad():
        next(clip.parameters()).add_(1e-3)
    write_folder(clip, tmp_path / "mine", title="toy")
    other = clip_encoder(str(tmp_path / "mine"))
    assert other.name == one.name and other.fingerprint != one.fingerprint


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [
        ("runs/mine/checkpoints/last.ckpt", "mine-last"),
        ("models/mine", "mine"),
        ("local-dir:models/mine", "mine"),
        ("hf-hub:org/Name-1.5", "Name-1.5"),
        ("weights/vit.safetensors", "vit"),
    ],
)
def test_names_of_checkpoints(checkpoint: str, name: str) -> None:
    assert short_name(checkpoint) == name
