"""A classifier's folder in plain timm: the same logits, and the card and files of a CLIP's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from timm.data import resolve_model_data_config

from medclip.models.timm_folder import write_timm
from medclip.models.vit import Classifier, VitShape
from medclip.types import Preprocess, UserError

PIXELS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "size": 32}


def classifier(**shape: Any) -> Classifier:
    torch.manual_seed(0)
    made = VitShape(image_size=32, patch_size=8, dim=32, depth=2, heads=2, drop_path=0.1, **shape)
    model = Classifier(made, ["edema", "mass"], Preprocess.from_dict(PIXELS))
    torch.nn.init.normal_(model.net.head.weight)
    return model.eval()


@pytest.mark.parametrize("shape", [{}, {"pre_norm": True, "quick_gelu": True, "eps": 1e-5}], ids=["mae", "clip"])
def test_plain_timm_gives_the_same_logits(shape: dict[str, Any], tmp_path: Path) -> None:
    model = classifier(**shape)
    write_timm(model, tmp_path / "model", title="Findings", licence="cc-by-4.0")
    net: Any = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    image = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(net(image), model({"image": image}), atol=1e-6, rtol=0)
    assert net.pretrained_cfg["label_names"] == ["edema", "mass"]
    config = resolve_model_data_config(net)
    assert (list(config["mean"]), config["input_size"]) == ([0.4, 0.5, 0.6], (3, 32, 32))
    data: Any = ModelCard((tmp_path / "model" / "README.md").read_text()).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("timm", "image-classification", "cc-by-4.0")


def test_a_folder_that_reads_back_differently_is_never_left(tmp_path: Path) -> None:
    model = classifier()
    model.net.register_forward_hook(lambda module, args, output: output * 1.01)
    with pytest.raises(RuntimeError, match="timm reads another model"):
        write_timm(model, tmp_path / "model", title="x")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "note").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        write_timm(classifier(), tmp_path, title="x")
