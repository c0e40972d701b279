"""Written folders in plain open_clip: same features, same ids, same pixels; and nothing half written."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image

from medclip.models.folder import write_folder
from medclip.models.load import load_clip
from medclip.types import Preprocess, UserError

TEXTS = ["left lung nodule", "H&amp;E stain, 40×", "", "x ray of the chest with effusions " * 20]
PIXELS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "interpolation": "bilinear", "resize_mode": "squash"}


@torch.no_grad()
def test_plain_open_clip_gives_the_same_logits_and_ids(any_cfg: dict, tmp_path: Path, no_network: None):
    torch.manual_seed(3)
    clip = load_clip(any_cfg, preprocess=PIXELS).eval()
    assert write_folder(clip, tmp_path / "model", title="toy").read_back <= 1e-6

    name = f"local-dir:{tmp_path / 'model'}"
    net, _, transform = open_clip.create_model_and_transforms(name)
    net.eval()
    ids = open_clip.get_tokenizer(name)(TEXTS)
    assert torch.equal(ids, clip.tokenizer(TEXTS))
    image = transform(Image.effect_noise((50, 40), 80).convert("RGB"))[None]
    theirs, _ = net.get_logits(image, ids)
    out = clip({"image": image, "text": ids})
    ours = out.logit_scale * out.image_features @ out.text_features.T
    ours = ours if out.logit_bias is None else ours + out.logit_bias
    assert (ours - theirs).abs().max() <= 1e-6
    assert Preprocess.from_dict(net.visual.preprocess_cfg) == clip.preprocess


def test_round_trip_there_and_back(any_cfg: dict, tmp_path: Path, no_network: None):
    clip = load_clip(any_cfg)
    write_folder(clip, tmp_path / "one", title="toy")
    again = load_clip(pretrained=str(tmp_path / "one"))
    write_folder(again, tmp_path / "two", title="toy")
    for name in ("open_clip_model.safetensors", "tokenizer.json", "vocab.txt"):
        if (tmp_path / "one" / name).exists():
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert again.preprocess == clip.preprocess


def test_open_clip_model_comes_back_from_us_unchanged(vit_cfg: dict, tmp_path: Path):
    """open_clip's own saving -> ours -> ours written -> open_clip."""
    net = open_clip.CLIP(**vit_cfg).eval()
    (tmp_path / "theirs").mkdir()
    torch.save(net.state_dict(), tmp_path / "theirs" / "open_clip_pytorch_model.bin")
    (tmp_path / "theirs" / "open_clip_config.json").write_text(json.dumps({"model_cfg": vit_cfg, "preprocess_cfg": {}}))
    write_folder(load_clip(pretrained=str(tmp_path / "theirs")), tmp_path / "ours", title="toy")
    back = open_clip.create_model(f"local-dir:{tmp_path / 'ours'}").eval()
    image, ids = torch.randn(2, 3, 32, 32), torch.randint(1, 49000, (2, 16))
    for one, other in zip(net(image, ids), back(image, ids), strict=True):
        assert torch.equal(one, other)


def test_card_says_what_it_is(bert_cfg: dict, tmp_path: Path):
    write_folder(load_clip(bert_cfg), tmp_path / "model", title="My CLIP", notes="Made of toys.")
    card = (tmp_path / "model" / "README.md").read_text()
    for part in ("# My CLIP", "Made of toys.", "24 tokens", "32 × 32", "hf_model_name", "library_name: open_clip"):
        assert part in card


def test_nothing_is_overwritten(vit_cfg: dict, tmp_path: Path):
    clip = load_clip(vit_cfg)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        write_folder(clip, tmp_path / "full", title="toy")
    assert (tmp_path / "full" / "note.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    write_folder(clip, tmp_path / "empty", title="toy")
    assert (tmp_path / "empty" / "open_clip_config.json").is_file()


@pytest.mark.parametrize("harm", ["weights", "pixels", "tokens"])
def test_a_folder_that_reads_back_differently_is_never_left(harm: str, vit_cfg: dict, tmp_path: Path):
    clip = load_clip(vit_cfg)
    if harm == "weights":
        clip.net.visual.register_forward_hook(lambda module, args, output: output * torch.linspace(1, 1.001, 32))
    elif harm == "pixels":
        clip.description["model_cfg"]["vision_cfg"]["image_size"] = 48
        clip.net = load_clip(pretrained=None, architecture=clip.description["model_cfg"]).net
    else:
        clip.tokenizer = load_clip(vit_cfg | {"text_cfg": vit_cfg["text_cfg"] | {"context_length": 12}}).tokenizer
    with pytest.raises(RuntimeError, match=r"open_clip reads (another|other)"):
        write_folder(clip, tmp_path / "model", title="toy")
    assert list(tmp_path.iterdir()) == []
