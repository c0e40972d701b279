"""Where a model comes from: the user's words -> its description and its weights.

A source that describes itself (an open_clip folder, a hub repository, one of our checkpoints) is believed, and what the
user says beside it must agree. A name with a tag has its preprocessing from open_clip's table of tags. A bare file of
weights knows nothing: the file beside it, the architecture's tags and the user must not contradict each other.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_clip.factory import get_model_config, list_models
from open_clip.pretrained import (
    download_pretrained,
    download_pretrained_from_hf,
    get_pretrained_cfg,
    list_pretrained_tags_by_model,
)
from torch import Tensor

from medclip.models.build import check_model_cfg, differing_keys, plain
from medclip.models.hf import folder_files, hf_files
from medclip.models.merge import merged
from medclip.models.tokenizer import first_line
from medclip.models.weights import read_checkpoint, read_state
from medclip.types import Preprocess, UserError

CONFIG = "open_clip_config.json"
WEIGHTS = (  # in open_clip's order of preference
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)


Architecture = str | dict[str, Any]  # an open_clip name, or an inline model_cfg


@dataclass(frozen=True)
class Source:
    """A description (see `medclip.models.build`), the weights for it if there are any, and how errors call it."""

    description: dict[str, Any]
    state: dict[str, Tensor] | None
    where: str


def find_source(
    architecture: Architecture | None,
    pretrained: str | None,
    preprocess: dict[str, Any] | None,
    cache_dir: str | None,
) -> Source:
    """Resolve `load_clip`'s words. See there."""
    if isinstance(architecture, str) and architecture.startswith(("hf-hub:", "local-dir:")) and pretrained is None:
        architecture, pretrained = None, architecture
    if pretrained is None:
        if architecture is None:
            raise UserError("no model given: say architecture= (an open_clip name) or pretrained= (a folder or file)")
        return Source(_new(architecture, preprocess, cache_dir), None, _name(architecture))
    path = Path(pretrained.removeprefix("local-dir:")).expanduser()
    if pretrained.startswith("hf-hub:"):
        source = _hub(pretrained, cache_dir)
    elif pretrained.startswith("local-dir:") or path.is_dir():
        source = _folder(path, None)
    elif path.suffix == ".ckpt":
        source = _checkpoint(path)
    elif path.is_file() and architecture is None:
        if not (path.parent / CONFIG).is_file():
            raise UserError(f"{path} holds weights only: say which architecture= they are of")
        source = _folder(path.parent, path)
    elif path.is_file():
        assert architecture is not None
        return _file(path, architecture, preprocess, cache_dir)
    else:
        return _tag(architecture, pretrained, cache_dir)
    if architecture is not None:
        own, asked = source.description["model_cfg"], named_config(architecture)
        if keys := differing_keys(own, asked):
            raise UserError(
                f"architecture {_name(architecture)} is not that of {source.where} ({', '.join(keys[:4])} differ): "
                "say architecture=null to take the model's own"
            )
    return source


def unlike(own: Preprocess, asked: Mapping[str, Any]) -> str | None:
    """The first key of `asked` that contradicts `own`, if any."""
    for key in asked:
        if key not in Preprocess.__dataclass_fields__ and key != "mode":
            raise UserError(f"unknown key preprocess.{key}: there are {', '.join(Preprocess.__dataclass_fields__)}")
    for key in ("mean", "std"):
        value = plain(asked.get(key))
        if value is not None and not (isinstance(value, list) and len(value) == 3):
            raise UserError(f"preprocess.{key}={value} must be three numbers: of red, green and blue, from 0 to 1")
    other = Preprocess.from_dict(own.as_dict() | plain(asked))
    for key in Preprocess.__dataclass_fields__:
        mine, theirs = getattr(own, key), getattr(other, key)
        if key in ("mean", "std"):
            same = all(math.isclose(a, b, abs_tol=1e-4) for a, b in zip(mine, theirs, strict=True))
        else:
            same = mine == theirs
        if not same:
            return key
    return None


def _new(architecture: Architecture, preprocess: dict[str, Any] | None, cache_dir: str | None) -> dict[str, Any]:
    model_cfg = named_config(architecture)
    default, _ = _usual_preprocess(architecture)
    asked = {key: value for key, value in (preprocess or {}).items() if key != "size"}
    unlike(default, asked)  # for the unknown keys
    return _describe(
        _name(architecture), model_cfg, default.as_dict() | asked, hf_files(model_cfg["text_cfg"], cache_dir)
    )


def _describe(origin: str, model_cfg: Any, preprocess_cfg: Any, files: dict[str, str]) -> dict[str, Any]:
    return {
        "origin": origin,
        "model_cfg": plain(model_cfg),
        "preprocess_cfg": Preprocess.from_dict(plain(preprocess_cfg or {})).as_dict(),
        "files": files,
    }


def _name(architecture: Architecture) -> str:
    return architecture if isinstance(architecture, str) else "custom"


def named_config(architecture: Architecture) -> dict[str, Any]:
    """open_clip's `model_cfg` of a name, or the inline one, checked."""
    if not isinstance(architecture, str):
        check_model_cfg(architecture)
        return architecture
    model_cfg = get_model_config(architecture.replace("/", "-"))
    if model_cfg is None:
        by_lower = {name.lower(): name for name in list_models()}
        close = [by_lower[name] for name in difflib.get_close_matches(architecture.lower(), by_lower, n=4)]
        hint = (
            f"did you mean {', '.join(close)}?"
            if close
            else "see `python -c 'import open_clip; print(open_clip.list_models())'`"
        )
        raise UserError(f"unknown architecture {architecture!r}: {hint}")
    return model_cfg


def _usual_preprocess(architecture: Architecture) -> tuple[Preprocess, bool]:
    """What the architecture's published weights were trained with, and whether they all agree on it."""
    if not isinstance(architecture, str):
        return Preprocess(), True
    tags = list_pretrained_tags_by_model(architecture)
    known = {Preprocess.from_dict(get_pretrained_cfg(architecture, tag)) for tag in tags}
    return (known.pop(), True) if len(known) == 1 else (Preprocess(), not known)


def _tag(architecture: Architecture | None, tag: str, cache_dir: str | None) -> Source:
    if not isinstance(architecture, str):
        raise UserError(f"pretrained={tag} is no file or folder here, and a tag needs the name of its architecture=")
    model_cfg = named_config(architecture)
    entry = get_pretrained_cfg(architecture, tag)
    if not entry:
        tags = list_pretrained_tags_by_model(architecture)
        close = difflib.get_close_matches(tag, tags, n=4, cutoff=0.4) or tags[:6]
        raise UserError(
            f"pretrained={tag} is no file, folder or tag of {architecture}; tags: {', '.join(close) or 'none'}"
        )
    if bool(entry.get("quick_gelu")) != bool(model_cfg.get("quick_gelu")):
        other = architecture.removesuffix("-quickgelu") if model_cfg.get("quick_gelu") else f"{architecture}-quickgelu"
        raise UserError(f"the weights {tag} have the other kind of GELU than {architecture}: say architecture={other}")
    try:
        path = download_pretrained(entry, cache_dir=cache_dir)
    except Exception as error:  # hub, http and file errors of several libraries
        raise UserError(
            f"cannot fetch {architecture} {tag} ({first_line(error)}): check the network or cache_dir"
        ) from error
    where = f"{architecture} {tag}"
    description = _describe(where, model_cfg, entry, hf_files(model_cfg["text_cfg"], cache_dir))
    return Source(description, read_state(Path(path)), where)


def _hub(name: str, cache_dir: str | None) -> Source:
    model_id = name.removeprefix("hf-hub:")
    try:
        config = Path(download_pretrained_from_hf(model_id, filename=CONFIG, cache_dir=cache_dir))
        weights = Path(download_pretrained_from_hf(model_id, cache_dir=cache_dir))
    except Exception as error:  # hub, http and file errors of several libraries
        raise UserError(
            f"cannot fetch {name} ({first_line(error)}): check the name and the network, or give a folder"
        ) from error
    model_cfg, preprocess_cfg = read_config(config)
    return Source(
        _describe(name, model_cfg, preprocess_cfg, hf_files(model_cfg["text_cfg"], cache_dir)),
        read_state(weights),
        name,
    )


def _folder(folder: Path, weights: Path | None) -> Source:
    if not folder.is_dir():
        raise UserError(f"folder {folder} does not exist")
    if not (folder / CONFIG).is_file():
        raise UserError(f"folder {folder} is no open_clip model: it has no {CONFIG}")
    model_cfg, preprocess_cfg = read_config(folder / CONFIG)
    if weights is None:
        found = [folder / name for name in WEIGHTS if (folder / name).is_file()]
        if not found:
            raise UserError(f"folder {folder} holds no weights: expected {WEIGHTS[0]} or another of open_clip's names")
        weights = found[0]
    files = folder_files(folder, model_cfg["text_cfg"])
    return Source(_describe(str(folder), model_cfg, preprocess_cfg, files), read_state(weights), str(folder))


def _file(path: Path, architecture: Architecture, preprocess: dict[str, Any] | None, cache_dir: str | None) -> Source:
    description = _new(architecture, preprocess, cache_dir)
    fed = Preprocess.from_dict(description["preprocess_cfg"])
    if (path.parent / CONFIG).is_file():
        _, beside = read_config(path.parent / CONFIG)
        beside = {key: value for key, value in beside.items() if key in ("mean", "std", "interpolation", "resize_mode")}
        if key := unlike(fed, beside):
            raise UserError(
                f"{path} lies beside a {CONFIG} that says {key}={beside[key]}, but {_name(architecture)} would be fed "
                f"{key}={plain(getattr(fed, key))}: load the folder (pretrained={path.parent}, architecture=null)"
            )
    elif preprocess is None and not _usual_preprocess(architecture)[1]:
        raise UserError(
            f"{path} does not say how its images were made, and published {_name(architecture)} weights differ in it: "
            "say preprocess= (mean, std, interpolation, resize_mode)"
        )
    return Source(description | {"origin": str(path)}, read_state(path), str(path))


def _checkpoint(path: Path) -> Source:
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    content = read_checkpoint(path)
    description, state = content.get("medclip"), content.get("state_dict")
    if not isinstance(description, dict) or not isinstance(state, dict) or "model_cfg" not in description:
        raise UserError(
            f"{path} is no checkpoint of `medclip train`: it has no `medclip` entry that describes its model"
        )
    prefix = "model.net."
    net = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if "lora" in description:
        net = merged(net, description["lora"], str(path))
    # How it was trained is over: it is a model like any other.
    description = {key: value for key, value in description.items() if key not in ("lora", "locked")}
    return Source(description, net, str(path))


def read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`model_cfg` and `preprocess_cfg` of an open_clip_config.json."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        model_cfg, preprocess_cfg = config["model_cfg"], config.get("preprocess_cfg") or {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no open_clip configuration ({error!r}): it needs a model_cfg") from error
    check_model_cfg(model_cfg)
    return model_cfg, preprocess_cfg
