"""Checkpoints of every kind through one loader."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from medclip.models.any import load_any
from medclip.models.clip import Clip
from medclip.models.dae import Dae
from medclip.models.load import load_clip
from medclip.models.maml import Maml
from medclip.models.vit import Classifier, build_vit
from medclip.types import UserError

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 1, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "layers": 1, "width": 16, "heads": 2},
}


def classifier(seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return build_vit(["Edema", "Hernia"], image_size=32, dim=32, depth=2, heads=2).eval()


def save(path: Path, model: Clip | Classifier | Dae | Maml, **changes: object) -> Path:
    """As the tasks save it."""
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"medclip": model.description, "state_dict": state} | changes, path)
    return path


def images() -> torch.Tensor:
    return torch.randint(0, 255, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def test_a_classifier_comes_back_with_its_logits(tmp_path: Path) -> None:
    model = classifier()
    back = load_any(pretrained=str(save(tmp_path / "best.ckpt", model))).eval()
    assert isinstance(back, Classifier) and back.description == model.description
    batch = {"image": images(), "key": ["a", "b", "c"]}
    assert torch.equal(back(batch), model(batch))  # type: ignore[arg-type]


@torch.inference_mode()
def test_a_clip_comes_as_load_clip_gives_it(tmp_path: Path) -> None:
    path = save(tmp_path / "last.ckpt", load_clip(TINY))
    one, two = load_any(pretrained=str(path)), load_clip(pretrained=str(path))
    assert isinstance(one, Clip) and torch.equal(one.encode_image(images()), two.encode_image(images()))
    assert isinstance(load_any(TINY), Clip)


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["clip", "classifier"])
def test_random_is_the_same_model_untrained(tmp_path: Path, kind: str) -> None:
    model = load_clip(TINY) if kind == "clip" else classifier(3)
    path = save(tmp_path / "a.ckpt", model)
    before = torch.get_rng_state()
    one, again, other = (load_any(pretrained=f"random:{path}", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert one.description["preprocess_cfg"] == model.description["preprocess_cfg"]
    states = [m.state_dict() for m in (one, again, other, model)]
    key = next(k for k in states[0] if "conv1.weight" in k or "patch_embed.proj.weight" in k)
    assert states[0].keys() == states[3].keys()
    assert torch.equal(states[0][key], states[1][key])
    assert not torch.equal(states[0][key], states[2][key]) and not torch.equal(states[0][key], states[3][key])


def test_what_cannot_be_evaluated_is_one_line(tmp_path: Path) -> None:
    model = classifier()
    mae = save(tmp_path / "mae.ckpt", model, medclip={"kind": "mae"})
    with pytest.raises(UserError, match="masked autoencoder, which names no findings: fine-tune it first"):
        load_any(pretrained=str(mae))
    for part, called, key in (
        (Dae(), "denoising auto-encoder", r"model\.visual\.parts\.1\.pretrained="),
        (Maml(3), "meta-learned net", r"model/visual=maml_dae model\.visual\.parts\.0\.pretrained="),
    ):
        own = save(tmp_path / "own.ckpt", part)
        for pretrained in (str(own), f"random:{own}"):
            with pytest.raises(UserError, match=rf"own.ckpt is a {called}, which answers nothing.*{key}{own}\)$"):
                load_any(pretrained=pretrained)
    short = {k: v for k, v in list(model.state_dict().items())[:-1]}
    cut = save(tmp_path / "cut.ckpt", model, state_dict={f"model.{k}": v for k, v in short.items()})
    with pytest.raises(UserError, match=r"cut.ckpt lacks net.head.bias"):
        load_any(pretrained=str(cut))
    empty = save(tmp_path / "empty.ckpt", model, state_dict=None)
    with pytest.raises(UserError, match=r"empty.ckpt holds no weights"):
        load_any(pretrained=str(empty))
    other = save(tmp_path / "other.ckpt", model, medclip={"kind": "classifier", "classes": ["a"]})
    with pytest.raises(UserError, match="does not describe its classifier"):
        load_any(pretrained=str(other))
    with pytest.raises(UserError, match="does not exist"):
        load_any(pretrained=str(tmp_path / "none.ckpt"))
