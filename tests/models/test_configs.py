"""Every `conf/model/*.yaml`: its architecture and tag exist in open_clip; the tiny one is built and takes a step."""

from __future__ import annotations

import open_clip
import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from medclip.config import CONF
from medclip.models.build import build_net

CONFIGS = sorted((CONF / "model").glob("*.yaml"))


def chosen(name: str) -> DictConfig:
    """A choice of the group, with what it builds on."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [f"model={name}"]).model


CLIPS = [path.stem for path in CONFIGS if chosen(path.stem)["_target_"] == "medclip.models.load.load_clip"]


def test_clips_and_others_are_there():
    assert {"clip_b16", "local", "tiny"} < set(CLIPS) < {path.stem for path in CONFIGS}


@pytest.mark.parametrize("name", CLIPS)
def test_clip_config(name: str):
    cfg = chosen(name)
    if OmegaConf.is_missing(cfg, "pretrained") or str(cfg.pretrained).startswith("hf-hub:"):
        assert cfg.architecture is None
    elif isinstance(cfg.architecture, str):
        assert cfg.pretrained in open_clip.list_pretrained_tags_by_model(cfg.architecture)
        tag = open_clip.get_pretrained_cfg(cfg.architecture, cfg.pretrained)
        model_cfg = open_clip.get_model_config(cfg.architecture)
        assert bool(tag.get("quick_gelu")) == bool(model_cfg.get("quick_gelu"))
        with torch.device("meta"):
            net = build_net(model_cfg)
        assert net.visual.image_size in ((224, 224), (256, 256))
    else:  # described in full, trained from scratch
        assert cfg.pretrained is None
        with torch.device("meta"):
            build_net(OmegaConf.to_container(cfg.architecture))


@pytest.mark.parametrize("name", ["tiny", "tiny_vit"])
def test_tiny_learns_a_batch_by_heart(name: str):
    cfg = OmegaConf.load(CONF / "model" / f"{name}.yaml")
    torch.manual_seed(0)
    clip = instantiate(cfg)
    assert 3e6 < sum(p.numel() for p in clip.parameters()) < 14e6
    assert clip.preprocess.size == (96, 96) and clip.tokenizer.context_length == 48
    batch = {
        "image": torch.randint(0, 256, (6, 3, 96, 96), dtype=torch.uint8),
        "text": clip.tokenizer([f"a field with {n} nuclei" for n in ("no", "two", "few", "many", "large", "pale")]),
    }
    optimizer = torch.optim.AdamW(clip.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        out = clip(batch)
        logits = out.logit_scale * out.image_features @ out.text_features.T
        loss = F.cross_entropy(logits, torch.arange(6))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
