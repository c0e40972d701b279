"""A text tower taken from another CLIP: its features to the bit, and still so after training with it locked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from medclip.config import CONF
from medclip.models.folder import write_folder
from medclip.models.load import load_clip
from medclip.models.text_tower import text_tower
from medclip.train import train
from medclip.types import UserError

TEXTS = ["a nodule of the left lung", ""]
LARGE = {"image_size": 32, "patch_size": 16, "layers": 3, "width": 96, "head_width": 32}


@pytest.mark.parametrize("custom", [False, True])
def test_texts_are_the_donors_and_images_the_models_own(custom: bool, any_cfg: dict, tmp_path: Path) -> None:
    """Also from open_clip's one class into its other, whose names differ."""
    torch.manual_seed(0)
    donor = load_clip(any_cfg | {"vision_cfg": LARGE}).eval()
    write_folder(donor, tmp_path / "donor", title="donor")
    clip = load_clip(any_cfg | ({"custom_text": True} if custom else {})).eval()
    ids, image = clip.tokenizer(TEXTS), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        texts, images, scale = clip.encode_text(ids), clip.encode_image(image), clip.logit_scale.clone()
        assert text_tower(clip, str(tmp_path / "donor")) is clip
        assert torch.equal(clip.encode_text(ids), donor.encode_text(ids))
        assert not torch.allclose(clip.encode_text(ids), texts)
        assert torch.equal(clip.encode_image(image), images) and torch.equal(clip.logit_scale, scale)


@pytest.mark.parametrize(
    "change, named",
    [({"embed_dim": 16}, "embed_dim"), ({"text_cfg": {"layers": 2}}, "text_cfg.layers")],
)
def test_another_tower_is_refused(change: dict[str, Any], named: str, vit_cfg: dict, tmp_path: Path) -> None:
    other = vit_cfg | change
    other["text_cfg"] = vit_cfg["text_cfg"] | change.get("text_cfg", {})
    write_folder(load_clip(other), tmp_path / "donor", title="donor")
    with pytest.raises(UserError, match=rf"another text tower than the model \({named}"):
        text_tower(load_clip(vit_cfg), str(tmp_path / "donor"))


def test_locked_text_tuning(tmp_path: Path) -> None:
    """The recipe on a toy: after training, the text tower's bytes are the donor's, and the image tower has moved."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        small = ["model=tiny_vit", "model.architecture.vision_cfg.layers=1", "model.architecture.text_cfg.layers=1"]
        words = compose("train", [*small]).model.architecture
        donor = load_clip(dict(words) | {"vision_cfg": LARGE | {"image_size": 96}})
        write_folder(donor, tmp_path / "donor", title="donor")
        cfg = compose(
            "train",
            [
                *("experiment=vitamin_ltt", *small, "model.pretrained=null"),
                *("adapt.text_tower.architecture=null", f"adapt.text_tower.pretrained={tmp_path / 'donor'}"),
                *("trainer.accelerator=cpu", "trainer.devices=1", "trainer.strategy=auto", "trainer.precision=32-true"),
                *("data.batch_size=4", "data.workers=0", f"output={tmp_path / 'run'}", "max_steps=3"),
                "data.sources=[{phantoms: {kind: xray, samples: 12, size: 64}}]",
            ],
        )
    train(cfg)
    content = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    state = {key.removeprefix("model.net."): value for key, value in content["state_dict"].items()}
    for key, value in donor.net.state_dict().items():
        if not key.startswith(("visual.", "logit_")):
            assert torch.equal(state[key], value), key
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = load_clip(words).net.state_dict()
    moved = [key for key in start if key.startswith("visual.") and not torch.equal(state[key], start[key])]
    assert len(moved) > 5 and not torch.equal(state["logit_scale"], start["logit_scale"])
    assert content["lineage"]["training"]["adapt"] == ["text_tower", "lock_text", "chunked"]
    assert [(p["role"], p["name"]) for p in content["lineage"]["parents"]] == [("text tower", "…/donor")]
    again = load_clip(pretrained=str(tmp_path / "run" / "checkpoints" / "last.ckpt")).eval()
    ids = again.tokenizer(TEXTS)
    with torch.no_grad():
        assert torch.equal(again.encode_text(ids), donor.eval().encode_text(ids))
