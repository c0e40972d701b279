"""Visual encoders: the published widths, what towers hand out, frozen ones, and the way through a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip import CLIP
from PIL import Image
from torch import Tensor

from medclip.models.build import build_clip
from medclip.models.clip import Clip
from medclip.models.dae import CODE, Dae, build_dae, squared_error
from medclip.models.grey import Grey
from medclip.models.load import load_clip
from medclip.models.mae import build_mae
from medclip.models.maml import Maml, build_maml
from medclip.models.parts import rebuild
from medclip.models.visual import ClipImages, DaeImages, Joined, MamlImages, dae_images, maml_images, vit_images
from medclip.models.vit import build_vit
from medclip.types import Preprocess, UserError

TEXT: dict[str, Any] = {"context_length": 8, "vocab_size": 49408, "layers": 1, "width": 16, "heads": 2}
VISION: dict[str, dict[str, Any]] = {
    "vit": {"image_size": 64, "patch_size": 16, "layers": 2, "width": 48, "head_width": 16},
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8},
    "timm_vit": {"image_size": 224, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"},
    "timm_conv": {"image_size": 64, "timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear"},
}


def clip_of(kind: str, dim: int = 24) -> Clip:
    torch.manual_seed(1)
    return load_clip({"embed_dim": dim, "vision_cfg": dict(VISION[kind]), "text_cfg": dict(TEXT)})


def images(n: int, size: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("architecture", "dim"), [("ViT-B-32", 576), ("RN50", 1088), ("RN50x4", 704)])
def test_published_widths(architecture: str, dim: int) -> None:
    with torch.device("meta"):
        clip = build_clip({"model_cfg": _small_of(architecture), "preprocess_cfg": {"size": 64}})
    clip.to_empty(device="cpu")
    assert Joined([ClipImages(clip), DaeImages()]).dim == dim


def _small_of(architecture: str) -> dict[str, Any]:
    """The published configuration, but for the depth and the image, which change no width."""
    from open_clip import get_model_config

    cfg: Any = get_model_config(architecture)
    cfg["vision_cfg"] |= {"image_size": 64, "layers": 1 if architecture.startswith("ViT") else [1, 1, 1, 1]}
    cfg["text_cfg"] |= TEXT
    return cfg


def test_maml_and_dae_are_128_and_the_code_is_16384() -> None:
    eye = Joined([MamlImages(), DaeImages()]).eval()
    objects, drawn = eye({"image": images(2, 96)})
    assert eye.dim == 128 and objects.shape == (2, 1, 128) and drawn.shape == (2,)
    assert Dae().encode(torch.zeros(1, 1, 128, 128)).shape == (1, 16, 32, 32) and CODE == 16384
    assert eye.preprocess is None


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_clips_features_are_those_of_encode_image_before_the_norm(kind: str) -> None:
    clip = clip_of(kind).eval()
    size = clip.preprocess.size[0]
    pixels = images(2, size)
    wanted = clip.net.encode_image(clip.normalise(pixels))
    unit = clip.encode_image(pixels)
    found: Any = ClipImages(clip).eval()({"image": pixels})
    torch.testing.assert_close(found[:, 0], wanted)
    assert not torch.allclose(found[:, 0], unit)


@pytest.mark.parametrize(("kind", "places"), [("vit", 16), ("resnet", 4), ("timm_vit", 196), ("timm_conv", 4)])
def test_tokens_of_every_kind_of_tower(kind: str, places: int) -> None:
    clip = clip_of(kind).eval()
    visual: Any = clip.net.visual
    size = clip.preprocess.size[0]
    pixels = images(2, size)
    eye: Any = ClipImages(clip, tokens=True).eval()
    found = eye({"image": pixels})
    assert found.shape == (2, places, eye.dim)
    # What the tower pools is the tokens it handed out: pooling them by hand gives its feature.
    x = clip.normalise(pixels)
    if kind == "resnet":
        side = int(places**0.5)
        by_hand = visual.attnpool(found.transpose(1, 2).reshape(2, eye.dim, side, side))
        torch.testing.assert_close(by_hand, visual(x))
    elif kind == "timm_conv":
        torch.testing.assert_close(visual.head(found.mean(1)), visual(x))
    else:
        # The class token is not among them, and each place is of its own patch.
        moved = eye({"image": pixels.flip(0)})
        torch.testing.assert_close(moved, found.flip(0))
        pooled = found.mean(1) @ visual.proj if kind == "vit" else visual.head(found.mean(1))
        assert not torch.allclose(pooled, visual(x), atol=1e-4)


@pytest.mark.parametrize("kind", ["vit", "resnet", "timm_vit", "timm_conv"])
def test_all_that_is_trained_of_tokens_gets_a_gradient(kind: str) -> None:
    eye: Any = ClipImages(clip_of(kind), tokens=True).train()
    eye({"image": images(2, eye.preprocess.size[0])}).square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in eye.parameters())
    assert any(not p.requires_grad for p in eye.parameters())  # the projection, which tokens do not pass


def test_a_frozen_clip_is_asked_once_an_image_and_stays_as_it_is() -> None:
    eye: Any = ClipImages(clip_of("resnet"), frozen=True).train()
    before = {key: value.clone() for key, value in eye.state_dict().items()}
    pixels = images(5, 64)
    plain = ClipImages(clip_of("resnet")).eval()({"image": pixels})
    for order in ([0, 1, 2], [2, 3, 4], [4, 4, 0]):
        torch.testing.assert_close(eye({"image": pixels[order]}), plain[order])  # pyright: ignore
    assert eye.memory.made == 5
    assert not any(p.requires_grad for p in eye.parameters()) and not eye.net.training
    assert all(torch.equal(value, before[key]) for key, value in eye.state_dict().items())


def test_other_weights_make_the_memory_forget() -> None:
    eye: Any = ClipImages(clip_of("vit"), frozen=True)
    pixels = images(2, 64)
    first = eye({"image": pixels})
    eye.load_state_dict({key: value * 1.5 for key, value in eye.state_dict().items()})
    second = eye({"image": pixels})
    assert not torch.allclose(first, second) and eye.memory.made == 4


def test_a_frozen_auto_encoder_trains_its_linear_layer_alone() -> None:
    torch.manual_seed(0)
    eye: Any = DaeImages(frozen=True).train()
    pixels = images(3, 64)
    objects, drawn = eye({"image": pixels})
    objects.sum().backward()
    assert {name for name, p in eye.named_parameters() if p.grad is not None} == {"convert.weight", "convert.bias"}
    assert drawn.tolist() == [0, 0, 0] and eye.memory.made == 3
    code = eye.net.encode(Grey(128)({"image": pixels})).flatten(1)
    torch.testing.assert_close(objects[:, 0], code @ eye.convert.weight.T + eye.convert.bias)


def test_the_drawing_is_judged_against_the_clean_picture() -> None:
    torch.manual_seed(0)
    eye: Any = DaeImages()
    pixels = images(2, 128)
    _, drawn = eye({"image": pixels})
    grey = Grey(128)({"image": pixels})
    by_hand = ((eye.net.decode(eye.net.encode(grey)) - grey) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(drawn, by_hand)
    drawn.mean().backward()
    assert eye.net.conv5.weight.grad.abs().sum() > 0 and eye.convert.weight.grad is None
    torch.testing.assert_close(squared_error(grey, grey + 0.5), torch.tensor([0.25, 0.25]))


@pytest.mark.parametrize("size", [84, 128])
def test_grey_pictures_are_pillows(size: int) -> None:
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)
    picture = Image.fromarray(small).resize((224, 224), Image.Resampling.BICUBIC)
    wanted = np.asarray(picture.convert("L").resize((size, size), Image.Resampling.BICUBIC)) / 255
    pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None]
    found = Grey(size)({"image": pixels})[0, 0].numpy()
    assert np.abs(found - wanted).max() < 1.6 / 255  # Pillow rounds twice


def test_one_object_is_laid_beside_each_place() -> None:
    clip: Any = ClipImages(clip_of("vit"), tokens=True).eval()
    maml: Any = MamlImages().eval()
    joined: Any = Joined([clip, maml])
    pixels = images(2, 64)
    found = joined({"image": pixels})
    assert found.shape == (2, 16, 48 + 64) and joined.preprocess == clip.preprocess
    torch.testing.assert_close(found[:, :, :48], clip({"image": pixels}))
    torch.testing.assert_close(found[:, 5, 48:], maml({"image": pixels})[:, 0])


def test_parts_that_want_other_images_are_refused() -> None:
    one, other = ClipImages(clip_of("vit")), ClipImages(clip_of("timm_vit"))
    with pytest.raises(UserError, match="want different images"):
        Joined([one, other])
    with pytest.raises(UserError, match="is empty"):
        Joined([])


@pytest.mark.parametrize("tokens", [False, True])
def test_rebuilt_from_their_descriptions_they_see_the_same(tokens: bool) -> None:
    eye: Any = Joined([ClipImages(clip_of("vit"), tokens=tokens), MamlImages(frozen=True), DaeImages()]).eval()
    again: Any = rebuild(eye.description).eval()
    again.load_state_dict(eye.state_dict())
    pixels = images(2, 64)
    for one, other in zip(eye({"image": pixels}), again({"image": pixels}), strict=True):
        assert torch.equal(one, other)
    assert again.description == eye.description and again.dim == eye.dim


def test_only_the_image_tower_is_kept() -> None:
    clip = clip_of("vit")
    assert isinstance(clip.net, CLIP)
    eye = ClipImages(clip)
    assert sum(p.numel() for p in eye.parameters()) == sum(p.numel() for p in clip.net.visual.parameters())


def saved(path: Path, model: Any) -> str:
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"medclip": model.description, "state_dict": state}, path)
    return str(path)


def test_from_a_masked_autoencoder_or_a_classifier(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"image_size": 64, "patch_size": 16, "dim": 48, "depth": 2, "heads": 3}
    mae = build_mae(**shape, decoder_dim=16, decoder_depth=1, decoder_heads=2, mask_ratio=0.5).eval()
    pixels = images(2, 64)
    mean: Any = vit_images(saved(tmp_path / "mae.ckpt", mae)).eval()
    places: Any = vit_images(str(tmp_path / "mae.ckpt"), tokens=True).eval()
    wanted = mae.encode({"image": pixels})[:, 1:]
    torch.testing.assert_close(places({"image": pixels}), wanted)
    torch.testing.assert_close(mean({"image": pixels})[:, 0], wanted.mean(1))

    classifier = build_vit(["a", "b"], init=str(tmp_path / "mae.ckpt"), **shape).eval()
    eye: Any = vit_images(saved(tmp_path / "vit.ckpt", classifier), frozen=True).eval()
    net: Any = classifier.net
    torch.testing.assert_close(net.head(eye({"image": pixels})[:, 0]), classifier({"image": pixels}))
    again: Any = rebuild(eye.description)
    again.load_state_dict(eye.state_dict())
    assert torch.equal(again({"image": pixels}), eye({"image": pixels}))


def test_weights_of_the_small_nets_come_from_their_runs(tmp_path: Path) -> None:
    torch.manual_seed(3)
    dae, maml = Dae(), Maml(3)
    pixels = images(2, 64)
    eye: Any = dae_images(saved(tmp_path / "dae.ckpt", dae))
    torch.testing.assert_close(eye({"image": pixels})[1], squared_error(*_drawn(dae, pixels)))
    torch.save(dae.state_dict(), tmp_path / "pretrained_ae.pth")  # as published: a bare state dict of these names
    assert torch.equal(build_dae(pretrained=str(tmp_path / "pretrained_ae.pth")).conv3.weight, dae.conv3.weight)
    small: Any = maml_images(saved(tmp_path / "maml.ckpt", maml)).eval()
    torch.testing.assert_close(small({"image": pixels})[:, 0], maml.eval().net(maml.prepare(pixels)))
    again = build_maml(5, pretrained=str(tmp_path / "maml.ckpt")).net.state_dict()
    assert all(torch.equal(value, maml.net.state_dict()[key]) for key, value in again.items())


def _drawn(dae: Dae, pixels: Tensor) -> tuple[Tensor, Tensor]:
    grey = dae.grey({"image": pixels})
    return dae.decode(dae.encode(grey)), grey


def test_other_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    dae, maml = saved(tmp_path / "dae.ckpt", Dae()), saved(tmp_path / "maml.ckpt", Maml(2))
    (tmp_path / "pretrained_maml.weights").write_bytes(b"")
    for make, match in [
        (lambda: dae_images(maml), "no denoising auto-encoder"),
        (lambda: maml_images(dae), "no meta-learned net"),
        (lambda: maml_images(str(tmp_path / "pretrained_maml.weights")), "pickle"),
        (lambda: vit_images(dae), "no ViT"),
        (lambda: ClipImages(clip_of("vit"), frozen=True, remember=-1), "GB of memory"),
    ]:
        with pytest.raises(UserError, match=match) as caught:
            make()
        assert "\n" not in str(caught.value)


def test_a_row_of_another_data_set_is_normalised_by_its_own_statistics() -> None:
    clip = clip_of("vit")
    eye: Any = ClipImages(clip, frozen=True)
    pixels = images(1, 64)
    own = {"mean": torch.tensor([clip.preprocess.mean]), "std": torch.tensor([clip.preprocess.std])}
    assert torch.equal(eye({"image": pixels}), eye({"image": pixels, **own}))
    assert not torch.allclose(
        eye({"image": pixels}), eye({"image": pixels, "mean": own["mean"] + 0.2, "std": own["std"]})
    )
    assert Preprocess.from_dict(eye.description["clip"]["preprocess_cfg"]) == clip.preprocess
