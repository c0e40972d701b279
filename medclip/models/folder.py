"""A model as an open_clip folder, which plain open_clip loads by `local-dir:` with the same logits and token ids.

    open_clip_config.json        {"model_cfg", "preprocess_cfg"}
    open_clip_model.safetensors  the weights
    config.json, tokenizer.json  where the text tower or the tokenizer is a Hugging Face one
    README.md, lineage.json      the model card, and what it was trained on and grew from
    onnx/                        both towers as ONNX, where asked for

The folder is written beside its place, loaded again by open_clip itself, compared, and only then moved there: what
stands in the place is whole and proven. CLIP's own byte-pair encoding is part of open_clip and needs no file.

open_clip resolves the `hf_model_name` of an HF text tower against the hub or the current directory, never against the
folder, so the folder's absolute path is written there: after a move, plain open_clip needs that one line changed (the
card says so); `load_clip` always looks into the folder itself.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor

from medclip.models.card import About, card
from medclip.models.clip import Clip, OpenClip
from medclip.models.hf import write_files
from medclip.models.lineage import write_lineage
from medclip.models.onnx import check_onnx, write_onnx
from medclip.models.source import CONFIG, WEIGHTS
from medclip.types import Preprocess, UserError

_TEXTS = [
    "a photo of a cat",
    "H&amp;E stain, 40×; mitoses (arrow) aren't seen",
    "chest X-ray: left-sided effusion " * 40,
    "",
]
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Written:
    """Largest differences of any output from the model's own, in the folder's library and in onnxruntime."""

    read_back: float
    onnx: float | None = None


def write_folder(clip: Clip, folder: Path, *, opset: int | None = None, **about: Any) -> Written:
    """Write `clip` (float32, on the CPU) to `folder` and prove it.

    Args:
        clip: what is written.
        folder: must not exist, or be empty.
        opset: write `onnx/` too, with this version of ONNX's operators.
        **about: what the card tells, see `About`: at least a `title`.

    Raises:
        UserError: the folder holds something, or cannot be written; the extra `onnx` is missing.
        RuntimeError: open_clip or onnxruntime reads back another model than was written.
    """
    refuse_nonempty(folder)
    if opset is not None:
        check_onnx(opset)
    about.setdefault("notes", f"Grown from {clip.description['origin']}.")
    told = About(**about)
    folder = folder.resolve()
    with placed(folder) as part:
        state = {key: value.detach().contiguous() for key, value in clip.net.state_dict().items()}
        save_file(state, part / WEIGHTS[0], metadata={"format": "pt"})
        write_files(clip.description.get("files") or {}, part)
        _write_config(clip, part, at=part)
        difference = _verify(clip, part)
        _write_config(clip, part, at=folder)
        onnx = None if opset is None else write_onnx(clip, part / "onnx", opset=opset)
        write_lineage(told.lineage, part)
        text = card(
            told,
            model=_model(clip),
            use=_use(clip, folder, onnx=onnx is not None),
            library="open_clip",
            pipeline="zero-shot-image-classification",
            purpose="zero-shot classification, retrieval, features for further training",
            scores="cosines of image and text",
        )
        (part / "README.md").write_text(text, encoding="utf-8")
    return Written(difference, onnx)


@contextmanager
def placed(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write into, moved to its place at the end; of one that fails nothing is left.

    Raises:
        UserError: it cannot be written.
    """
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        yield part
        part.replace(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder} ({error.strerror or error}): choose another output=") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def refuse_nonempty(folder: Path) -> None:
    """Raises: UserError where something would be overwritten."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"output folder {folder} is not empty: choose another output=")


def _write_config(clip: Clip, part: Path, at: Path) -> None:
    model_cfg = deepcopy(clip.description["model_cfg"])
    text_cfg = model_cfg["text_cfg"]
    if text_cfg.get("hf_model_name"):
        text_cfg |= {"hf_model_name": str(at), "hf_model_pretrained": False}
    if text_cfg.get("hf_tokenizer_name"):
        text_cfg["hf_tokenizer_name"] = str(at)
    config = {"model_cfg": model_cfg, "preprocess_cfg": clip.preprocess.as_dict()}
    (part / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")


@torch.no_grad()
def _verify(clip: Clip, folder: Path) -> float:
    """Load `folder` with open_clip alone and compare; the largest difference between any two features."""
    name = f"local-dir:{folder}"
    net: OpenClip = open_clip.create_model_and_transforms(name)[0]  # type: ignore[assignment]
    read_back: dict[str, Any] = net.visual.preprocess_cfg  # type: ignore[assignment]
    ids, own_ids = open_clip.get_tokenizer(name)(_TEXTS), clip.tokenizer(_TEXTS)
    if not torch.equal(ids, own_ids):
        raise RuntimeError(f"open_clip reads other token ids from {folder} than the model was trained with")
    if Preprocess.from_dict(read_back) != clip.preprocess:
        raise RuntimeError(f"open_clip reads another preprocessing from {folder}: {read_back}")
    training = clip.training
    clip.eval()
    net.eval()
    image = torch.randn((2, 3, *clip.preprocess.size), generator=torch.Generator().manual_seed(0))
    pairs: list[tuple[Tensor, Tensor]] = [
        (clip.encode_image(image), net.encode_image(image, normalize=True)),
        (clip.encode_text(ids), net.encode_text(ids, normalize=True)),
        (clip.logit_scale, net.logit_scale),
    ]
    clip.train(training)
    difference = max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
    if not difference <= _TOLERANCE:  # catches NaN as well
        raise RuntimeError(f"open_clip reads another model from {folder}: features differ by {difference:.1e}")
    return difference


def _model(clip: Clip) -> str:
    pre = clip.preprocess
    towers = {"image": clip.net.visual, "all": clip.net}
    sizes = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in towers.items()}
    return f"""- images: {pre.size[0]} × {pre.size[1]}, {pre.interpolation}, {pre.resize_mode}
- mean {list(pre.mean)}, std {list(pre.std)}
- text: {clip.tokenizer.context_length} tokens
- parameters: {sizes["all"]:.1f} million, {sizes["image"]:.1f} of them in the image tower"""


def _use(clip: Clip, folder: Path, *, onnx: bool) -> str:
    text_cfg = clip.description["model_cfg"]["text_cfg"]
    moved = (
        "\n\nPlain open_clip finds the text tower by `hf_model_name` in `open_clip_config.json`, as an absolute path: "
        "put the new one there when the folder has moved."
        if text_cfg.get("hf_model_name")
        else ""
    )
    towers = (
        "\n\n`onnx/` holds both towers for onnxruntime, without torch; `onnx/onnx.json` says what they take and give."
        if onnx
        else ""
    )
    return f"""```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{folder.name}")
tokenizer = open_clip.get_tokenizer("local-dir:{folder.name}")
```{towers}{moved}"""
