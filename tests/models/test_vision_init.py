"""A CLIP whose image tower starts from a masked autoencoder computes the encoder's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from medclip.models.load import load_clip
from medclip.models.mae import Mae, build_mae, save_mae
from medclip.models.vit import build_vit
from medclip.types import UserError

SIZE: dict[str, Any] = {"image_size": 224, "patch_size": 16, "dim": 192, "depth": 12, "heads": 3}
DECODER: dict[str, Any] = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
STATISTICS = {"mean": [0.5056] * 3, "std": [0.252] * 3}
CLIP: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 224,
        "timm_model_name": "vit_tiny_patch16_224",
        "timm_pool": "avg",
        "timm_proj": "linear",
    },
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def mae(tmp_path_factory: pytest.TempPathFactory) -> tuple[Mae, Path]:
    folder = tmp_path_factory.mktemp("mae")
    torch.manual_seed(0)
    model = build_mae(**SIZE, **DECODER, mask_ratio=0.9, preprocess=STATISTICS)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    save_mae(model, folder / "mae.pth")
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"medclip": model.description, "state_dict": state}, folder / "mae.ckpt")
    return model, folder


def test_the_tower_computes_the_encoders_tokens(mae):
    model, folder = mae
    clip = load_clip(CLIP, vision_init=str(folder / "mae.ckpt")).eval()
    assert clip.preprocess.mean == (0.5056,) * 3 and clip.preprocess.std == (0.252,) * 3
    image = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    tokens = clip.net.visual.trunk.forward_features(clip.normalise(image))
    expected = model.encode({"image": image})
    torch.testing.assert_close(tokens, expected, rtol=1e-3, atol=1e-4)
    # And the features are those of the patches' mean.
    head = clip.net.visual.head
    by_hand = torch.nn.functional.normalize(head(expected[:, 1:].mean(1)), dim=-1)
    torch.testing.assert_close(clip.encode_image(image), by_hand, rtol=1e-3, atol=1e-4)


def test_a_published_file_leaves_the_clips_statistics(mae):
    clip = load_clip(CLIP, vision_init=str(mae[1] / "mae.pth"))
    assert clip.preprocess.mean == load_clip(CLIP).preprocess.mean
    assert torch.equal(clip.net.visual.trunk.blocks[3].mlp.fc1.weight, mae[0].blocks[3].mlp.fc1.weight)


def test_a_checkpoint_of_such_a_clip_needs_the_autoencoder_no_more(mae, tmp_path: Path):
    clip = load_clip(CLIP, vision_init=str(mae[1] / "mae.ckpt"))
    state = {f"model.net.{key}": value for key, value in clip.net.state_dict().items()}
    torch.save({"medclip": clip.description, "state_dict": state}, tmp_path / "last.ckpt")
    again = load_clip(pretrained=str(tmp_path / "last.ckpt"))
    assert again.preprocess == clip.preprocess
    assert torch.equal(again.net.visual.trunk.norm.weight, mae[0].norm.weight)


def test_contradicting_statistics_are_refused(mae):
    with pytest.raises(UserError, match=r"preprocess\.mean.*contradicts"):
        load_clip(CLIP, vision_init=str(mae[1] / "mae.ckpt"), preprocess={"mean": [0.1, 0.2, 0.3]})


def test_what_does_not_fit_is_named(mae, tmp_path: Path):
    path = str(mae[1] / "mae.pth")
    own = {"image_size": 224, "patch_size": 16, "layers": 12, "width": 192, "head_width": 64}
    with pytest.raises(UserError, match="model=vit_s16_clip"):
        load_clip(CLIP | {"vision_cfg": own}, vision_init=path)
    small = CLIP["vision_cfg"] | {"timm_model_name": "vit_small_patch16_224"}
    with pytest.raises(UserError, match=r"cls_token of \(1, 1, 192\) instead of \(1, 1, 384\)"):
        load_clip(CLIP | {"vision_cfg": small}, vision_init=path)
    with pytest.raises(UserError, match="does not exist"):
        load_clip(CLIP, vision_init="/nowhere/mae.pth")
    classifier = build_vit(["a"], **SIZE)  # its last norm is another one
    torch.save({"model": classifier.net.state_dict()}, tmp_path / "classifier.pth")
    with pytest.raises(UserError, match=r"lacks norm\.weight"):
        load_clip(CLIP, vision_init=str(tmp_path / "classifier.pth"))
