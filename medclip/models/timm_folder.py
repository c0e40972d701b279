"""A classifier as a timm folder, which plain timm loads by `local-dir:` with the same logits.

config.json        {"architecture", "model_args", "pretrained_cfg"}: timm's; `label_names` are the findings
model.safetensors  the weights
README.md, lineage.json, onnx/   as of a CLIP, see `medclip.models.folder`
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from medclip.models.card import About, card
from medclip.models.folder import Written, placed, refuse_nonempty
from medclip.models.lineage import write_lineage
from medclip.models.onnx import check_onnx, write_onnx
from medclip.models.vit import Classifier

_TOLERANCE = 1e-5  # of a logit
# timm's names for a ViT whose norms have this eps; all else of it is said in `model_args`.
_ARCHITECTURES = {1e-6: "vit_base_patch16_224", 1e-5: "vit_base_patch16_clip_224"}

_USE = """```python
import timm

model = timm.create_model("local-dir:{}", pretrained=True).eval()
```"""
_ONNX = "\n\n`onnx/` holds it for onnxruntime, without torch; `onnx/onnx.json` says what it takes and gives."


def write_timm(model: Classifier, folder: Path, *, opset: int | None = None, **about: Any) -> Written:
    """Write `model` (float32, on the CPU) to `folder` and prove it; for the arguments see `folder.write_folder`.

    Raises:
        UserError: the folder holds something, or cannot be written; the extra `onnx` is missing.
        RuntimeError: timm or onnxruntime reads back another model than was written.
    """
    refuse_nonempty(folder)
    if opset is not None:
        check_onnx(opset)
    told = About(**about)
    folder = folder.resolve()
    with placed(folder) as part:
        state = {key: value.detach().contiguous() for key, value in model.net.state_dict().items()}
        save_file(state, part / "model.safetensors", metadata={"format": "pt"})
        (part / "config.json").write_text(json.dumps(_config(model), indent=2), encoding="utf-8")
        difference = _verify(model, part)
        onnx = None if opset is None else write_onnx(model, part / "onnx", opset=opset)
        write_lineage(told.lineage, part)
        text = card(
            told,
            model=_model(model),
            use=_USE.format(folder.name) + (_ONNX if onnx is not None else ""),
            library="timm",
            pipeline="image-classification",
            purpose="the findings named above, features for further training",
            scores="logits",
        )
        (part / "README.md").write_text(text, encoding="utf-8")
    return Written(difference, onnx)


def _config(model: Classifier) -> dict[str, Any]:
    shape, pre = model.shape, model.preprocess
    return {
        "architecture": _ARCHITECTURES[shape.eps],
        "num_classes": len(model.classes),
        "model_args": {
            "global_pool": "avg",
            "img_size": shape.image_size,
            "patch_size": shape.patch_size,
            "embed_dim": shape.dim,
            "depth": shape.depth,
            "num_heads": shape.heads,
            "pre_norm": shape.pre_norm,
            "act_layer": "quick_gelu" if shape.quick_gelu else "gelu",
        },
        "pretrained_cfg": {
            "input_size": [3, *pre.size],
            "fixed_input_size": True,
            "interpolation": pre.interpolation,
            "crop_pct": 1.0,
            "mean": list(pre.mean),
            "std": list(pre.std),
            "num_classes": len(model.classes),
            "label_names": model.classes,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


@torch.no_grad()
def _verify(model: Classifier, folder: Path) -> float:
    """Load `folder` with timm alone and compare; the largest difference of any logit."""
    net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    training = model.training
    model.eval()
    image = torch.randn((2, 3, *model.preprocess.size), generator=torch.Generator().manual_seed(0))
    difference = float((model({"image": image}) - net(image)).abs().max())
    model.train(training)
    if not difference <= _TOLERANCE:  # catches NaN as well
        raise RuntimeError(f"timm reads another model from {folder}: logits differ by {difference:.1e}")
    return difference


def _model(model: Classifier) -> str:
    pre = model.preprocess
    return f"""- findings, a logit each: {", ".join(model.classes)}
- images: {pre.size[0]} × {pre.size[1]}, {pre.interpolation}, {pre.resize_mode}
- mean {list(pre.mean)}, std {list(pre.std)}
- parameters: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} million"""
