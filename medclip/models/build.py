"""A model from its description: a plain dict that holds all but the weights.

    {"origin": its source, "model_cfg": open_clip's, "preprocess_cfg": `Preprocess.as_dict`, "files": {name: text}}

`files` are the small texts that a Hugging Face tower needs (the text model's `config.json`, the tokenizer's), so that
a checkpoint with an HF tower is rebuilt on a machine without network or cache: they are written to a temporary folder,
and open_clip is pointed at it. They come from downloads and checkpoints, so only known names are written, and none
may ask for code of its own to be run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

from medclip.models.clip import Clip, OpenClip
from medclip.models.hf import write_files
from medclip.models.tokenizer import build_tokenizer
from medclip.types import Preprocess, UserError

# Where a tower's first weights or its texts come from says nothing of what the model is.
_ORIGIN_KEYS = {
    "hf_model_name",
    "hf_tokenizer_name",
    "hf_model_pretrained",
    "timm_model_pretrained",
    "tokenizer_kwargs",
}


def build_clip(description: Mapping[str, Any], *, initial_towers: bool = False) -> Clip:
    """The described model with random weights, in float32 on the CPU.

    Args:
        initial_towers: honour `hf_model_pretrained: true` and `timm_model_pretrained: true` of the configuration, that
            is fetch the towers' own weights; for a model that gets no weights as a whole.

    Raises:
        UserError: the configuration is not one that open_clip can build.
    """
    model_cfg, files = description["model_cfg"], description.get("files") or {}
    with tempfile.TemporaryDirectory(prefix="medclip-") as folder:
        write_files(files, Path(folder))
        net = build_net(model_cfg, folder if files else None, initial_towers=initial_towers)
        tokenizer = build_tokenizer(model_cfg["text_cfg"], folder if files else None)
    return Clip(net, Preprocess.from_dict(description["preprocess_cfg"]), tokenizer, dict(description))


def build_net(model_cfg: Mapping[str, Any], hf_folder: str | None = None, *, initial_towers: bool = False) -> OpenClip:
    """open_clip's model for `model_cfg`, as its factory would choose it; `hf_folder` has an HF tower's config.json."""
    cfg = deepcopy(plain(model_cfg))
    check_model_cfg(cfg)
    vision, text = cfg["vision_cfg"], cfg["text_cfg"]
    custom_text = cfg.pop("custom_text", False) or "hf_model_name" in text
    vision["timm_model_pretrained"] = initial_towers and bool(vision.get("timm_model_pretrained"))
    if text.get("hf_model_name"):
        text["hf_model_pretrained"] = initial_towers and bool(text.get("hf_model_pretrained"))
        if hf_folder and not text["hf_model_pretrained"]:
            text["hf_model_name"] = hf_folder
    try:
        return (CustomTextCLIP if custom_text else CLIP)(**cfg)
    except (TypeError, ValueError, KeyError, AssertionError, RuntimeError, OSError) as error:
        raise UserError(
            f"open_clip cannot build this model configuration: {str(error).strip()[:300] or error!r}"
        ) from error


def check_model_cfg(cfg: Mapping[str, Any]) -> None:
    """Refuse what is no dual encoder of open_clip's, with the key that is wrong."""
    for key in ("embed_dim", "vision_cfg", "text_cfg"):
        if key not in cfg:
            raise UserError(f"model configuration lacks `{key}`: it needs embed_dim, vision_cfg and text_cfg")
    if "multimodal_cfg" in cfg:
        raise UserError("CoCa models (multimodal_cfg) are not supported: choose a dual encoder")
    for key, kind in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        if not isinstance(cfg[key], Mapping):
            raise UserError(f"{key} of the model configuration is {cfg[key]!r}: it needs open_clip's keys and values")
        known = [field.name for field in fields(kind)]
        if unknown := [name for name in cfg[key] if name not in known]:
            raise UserError(f"unknown key `{unknown[0]}` in {key} of the model configuration; open_clip knows {known}")


def differing_keys(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Keys in which two `model_cfg` describe different models, defaults filled in; empty when they are the same."""
    flat = [_flat(one), _flat(other)]
    return sorted(key for key in flat[0].keys() | flat[1].keys() if flat[0].get(key) != flat[1].get(key))


def _flat(model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    cfg = {"custom_text": False, "quick_gelu": False, **plain(model_cfg)}
    for key, kind in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        tower = {field.name: field.default for field in fields(kind)} | cfg.pop(key)
        cfg |= {f"{key}.{name}": value for name, value in tower.items() if name not in _ORIGIN_KEYS}
    cfg["custom_text"] = cfg["custom_text"] or "hf_model_name" in model_cfg["text_cfg"]
    size = cfg["vision_cfg.image_size"]
    cfg["vision_cfg.image_size"] = [size, size] if isinstance(size, int) else list(size)
    return cfg


def plain(value: Any) -> Any:
    """Mappings and sequences of any kind (OmegaConf's too) as dicts and lists, fit for JSON and `weights_only`."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value
