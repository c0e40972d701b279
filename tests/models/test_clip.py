"""`Clip` against open_clip's own forward pass and normalisation."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from medclip.models.load import load_clip
from medclip.types import Batch, DualEncoder, Preprocess


def _batch(context: int = 16) -> Batch:
    g = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 3, 32, 32), generator=g, dtype=torch.uint8)
    return {"image": image, "text": torch.randint(1, 49408, (3, context), generator=g)}


@pytest.mark.parametrize("mean, std", [(Preprocess.mean, Preprocess.std), ((0.0, 0.5, 0.485), (1.0, 0.5, 0.229))])
def test_uint8_normalisation_is_open_clips(vit_cfg: dict, mean: tuple[float, ...], std: tuple[float, ...]):
    clip = load_clip(vit_cfg, preprocess={"mean": mean, "std": std})
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    theirs = image_transform_v2(PreprocessCfg(size=32, mean=mean, std=std), is_train=False)(Image.fromarray(pixels))
    ours = clip.normalise(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    assert ours.dtype == torch.float32
    assert (ours[0] - theirs).abs().max() <= 1e-6


def test_float_images_are_taken_as_normalised(vit_cfg: dict):
    clip = load_clip(vit_cfg)
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(clip.normalise(image), image)


@pytest.mark.parametrize("family", ["vit", "siglip"])
def test_output_is_open_clips(family: str, request: pytest.FixtureRequest):
    cfg = request.getfixturevalue(f"{family}_cfg")
    clip = load_clip(cfg).eval()
    batch = _batch()
    out = clip(batch)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (clip.preprocess.mean, clip.preprocess.std))
    theirs = clip.net((batch["image"] / 255 - mean) / std, batch["text"])
    for ours, reference in zip(out[:3], theirs[:3], strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(out.image_features.norm(dim=-1), torch.ones(3))
    if "init_logit_bias" in cfg:
        assert out.logit_bias is not None and out.logit_bias.item() == -10
    else:
        assert out.logit_bias is None
    assert isinstance(clip, DualEncoder)


def test_bf16_weights_give_unit_float32_features_near_the_exact_ones(vit_cfg: dict):
    torch.manual_seed(0)
    exact = load_clip(vit_cfg).eval()
    rounded = load_clip(vit_cfg, precision="bf16").eval()
    rounded.net.load_state_dict(exact.net.state_dict())
    image = _batch()["image"]
    features = rounded.encode_image(image)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(3))
    assert F.cosine_similarity(features, exact.encode_image(image)).min() > 0.999


def test_state_dict_is_open_clips_own_and_scale_can_be_clamped(vit_cfg: dict):
    clip = load_clip(vit_cfg)
    assert set(clip.state_dict()) == {f"net.{key}" for key in clip.net.state_dict()}
    with torch.no_grad():
        clip.logit_scale.fill_(10).clamp_(max=4.6052)
    assert clip(_batch()).logit_scale.item() == pytest.approx(100, abs=0.01)


def test_vector_logit_scale_comes_out_as_a_scalar(siglip_cfg: dict):
    clip = load_clip(siglip_cfg | {"nonscalar_logit_scale": True})
    out = clip(_batch())
    assert out.logit_scale.shape == () and out.logit_bias is not None and out.logit_bias.shape == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViTamin-S", "MobileCLIP2-S0", "convnext_tiny", "RN50"])
def test_families_give_open_clips_features(name: str):
    cfg = open_clip.get_model_config(name)
    clip = load_clip(name).eval()
    image = torch.randint(0, 256, (1, 3, *clip.preprocess.size), dtype=torch.uint8)
    ids = clip.tokenizer(["a chest X-ray"])
    with torch.no_grad():
        out = clip({"image": image, "text": ids})
        theirs = clip.net(clip.normalise(image), ids)
    torch.testing.assert_close(out.image_features, theirs[0])
    torch.testing.assert_close(out.text_features, theirs[1])
    assert out.image_features.shape == (1, cfg["embed_dim"])


def test_channels_last_is_the_same_model_in_another_layout():
    cfg = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear"},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
    }
    torch.manual_seed(0)
    plain = load_clip(cfg).eval()
    torch.manual_seed(0)
    last = load_clip(cfg, channels_last=True).eval()
    image = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    assert last.normalise(image).is_contiguous(memory_format=torch.channels_last)
    assert last.net.visual.trunk.conv1[0].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last.encode_image(image), plain.encode_image(image), atol=1e-5, rtol=1e-5)
