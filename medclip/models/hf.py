"""The small text files that a Hugging Face text tower or tokenizer is made from: fetched, read, checked, written."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medclip.models.tokenizer import HubTokenizer, first_line
from medclip.types import UserError

HF_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)


def write_files(files: Mapping[str, str], folder: Path) -> None:
    """Write a description's `files` into `folder`.

    Raises:
        UserError: a name that is none of `HF_FILES`, a damaged file, or one that asks for code to be run.
    """
    for name, text in files.items():
        if name not in HF_FILES:
            raise UserError(f"the model's description holds a file {name!r}, which is not one of {', '.join(HF_FILES)}")
        try:
            own_code = name.endswith("config.json") and "auto_map" in json.loads(text)
        except ValueError as error:
            raise UserError(f"{name} of this model is no JSON ({error}): get it again") from error
        if own_code:
            raise UserError(f"{name} of this model asks for code of its own (auto_map), which is never run")
        (folder / name).write_text(text, encoding="utf-8")


def read_files(folder: Path) -> dict[str, str]:
    """The inverse: those of `HF_FILES` that lie in `folder`."""
    return {name: (folder / name).read_text(encoding="utf-8") for name in HF_FILES if (folder / name).is_file()}


def hf_files(text_cfg: Mapping[str, Any], cache_dir: str | None) -> dict[str, str]:
    """The files for `text_cfg` from the hub, its cache, or the local folders that it names.

    Raises:
        UserError: they cannot be had.
    """
    files = {}
    if name := text_cfg.get("hf_tokenizer_name"):
        files |= _tokenizer_files(name, text_cfg, cache_dir)
    if name := text_cfg.get("hf_model_name"):
        files["config.json"] = _config(name, cache_dir)
    return files


def folder_files(folder: Path, text_cfg: Mapping[str, Any]) -> dict[str, str]:
    """The files for `text_cfg` from an open_clip folder, without network.

    A folder as downloaded from the hub often lacks the text model's own `config.json` (open_clip issue 772): it is then
    taken from where `hf_model_name` points on this machine, or from the hub's cache.

    Raises:
        UserError: they cannot be had.
    """
    tokenizer, model = text_cfg.get("hf_tokenizer_name"), text_cfg.get("hf_model_name")
    if not tokenizer and not model:
        return {}
    files = read_files(folder)
    if model and "config.json" not in files:
        files["config.json"] = _config(model, None, folder=folder)
    if tokenizer and not {"tokenizer.json", "vocab.txt", "vocab.json"} & files.keys():
        files |= _tokenizer_files(str(folder), text_cfg, None)  # sentencepiece models become a tokenizer.json
    return files


def _config(name: str, cache_dir: str | None, *, folder: Path | None = None) -> str:
    try:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(
            name, cache_dir=cache_dir, trust_remote_code=False, local_files_only=folder is not None
        )
    except ImportError as error:
        raise UserError("this model's text tower needs transformers: pip install 'medclip-adapt[hf]'") from error
    except Exception as error:  # hub, http and parser errors of several libraries
        place = f"the folder {folder}" if folder else "a local folder, and name that as hf_model_name"
        raise UserError(
            f"text model {name} cannot be read ({first_line(error)}): put its config.json into {place}"
        ) from error
    return config.to_json_string()


def _tokenizer_files(name: str, text_cfg: Mapping[str, Any], cache_dir: str | None) -> dict[str, str]:
    options = dict(text_cfg.get("tokenizer_kwargs") or {}) | {"trust_remote_code": False, "cache_dir": cache_dir}
    if Path(name).is_dir():
        options["local_files_only"] = True
    try:
        tokenizer = HubTokenizer(name, text_cfg.get("context_length") or 77, text_cfg.get("tokenizer_mode"), **options)
        with tempfile.TemporaryDirectory(prefix="medclip-") as folder:
            tokenizer.inner.save_pretrained(folder)
            return {key: text for key, text in read_files(Path(folder)).items() if key != "config.json"}
    except ImportError as error:
        raise UserError("this model's tokenizer needs transformers: pip install 'medclip-adapt[hf]'") from error
    except Exception as error:  # hub, http and parser errors of several libraries
        raise UserError(
            f"tokenizer {name} cannot be read ({first_line(error)}): check the name and the network, "
            "or put its tokenizer.json into a local folder and name that"
        ) from error
