"""What a model is, without its weights: for counting it before anything is fetched."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from open_clip.pretrained import download_pretrained_from_hf

from medclip.models.build import plain
from medclip.models.source import CONFIG, named_config, read_config
from medclip.models.tokenizer import first_line
from medclip.models.weights import read_checkpoint
from medclip.types import UserError


def describe(
    architecture: str | Mapping[str, Any] | None, pretrained: str | None, cache_dir: str | None = None
) -> dict[str, Any]:
    """The `model_cfg` of what `load_clip` would load, towers' own weights left out.

    A tag is not resolved, for its architecture is named beside it; of an hf-hub: repository only the small
    configuration is fetched; of a checkpoint the tensors stay on the disk.

    Raises:
        UserError: nothing says what the model is, or it cannot be read.
    """
    if isinstance(architecture, str) and architecture.startswith(("hf-hub:", "local-dir:")) and pretrained is None:
        architecture, pretrained = None, architecture
    if architecture is not None:
        return _without_weights(named_config(plain(architecture)))
    if pretrained is None:
        raise UserError("no model given: say architecture= (an open_clip name) or pretrained= (a folder or file)")
    path = Path(pretrained.removeprefix("local-dir:")).expanduser()
    if pretrained.startswith("hf-hub:"):
        try:
            name = pretrained.removeprefix("hf-hub:")
            path = Path(download_pretrained_from_hf(name, filename=CONFIG, cache_dir=cache_dir))
        except Exception as error:  # hub, http and file errors of several libraries
            raise UserError(
                f"cannot fetch the configuration of {pretrained} ({first_line(error)}): check the name and the network"
            ) from error
        return _without_weights(read_config(path)[0])
    if path.suffix == ".ckpt":
        if not path.is_file():
            raise UserError(f"checkpoint {path} does not exist")
        description = read_checkpoint(path).get("medclip")
        if not isinstance(description, Mapping) or "model_cfg" not in description:
            raise UserError(f"{path} is no checkpoint of a CLIP by `medclip train`: it does not describe one")
        return _without_weights(description["model_cfg"])
    folder = path if path.is_dir() else path.parent
    if not (folder / CONFIG).is_file():
        raise UserError(f"pretrained={pretrained} does not say what it is: say architecture=")
    return _without_weights(read_config(folder / CONFIG)[0])


def _without_weights(model_cfg: Mapping[str, Any]) -> dict[str, Any]:
    cfg = plain(model_cfg)
    for tower, key in (("vision_cfg", "timm_model_pretrained"), ("text_cfg", "hf_model_pretrained")):
        if cfg[tower].get(key):
            cfg[tower][key] = False
    return cfg
