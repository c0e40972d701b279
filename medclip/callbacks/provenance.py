"""What made a run: its config, the revision of the code, the versions of the packages. No secrets.

Written once to `provenance.json` in the run folder and handed to every logger as its hyper-parameters.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import OmegaConf

PACKAGES = ("medclip-adapt", "torch", "torchvision", "open_clip_torch", "timm", "transformers", "pytorch-lightning")
SECRET = re.compile(r"(^|_)(token|secret|password|passwd|api_?key|access_?key|credentials?)s?($|_)", re.IGNORECASE)
URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")


class Provenance(pl.Callback):
    """Writes `provenance.json` to `output`, the run folder, which holds `config.yaml`."""

    def __init__(self, output: str) -> None:
        self.output = Path(output)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        facts = {**revision(Path(__file__).parent), **versions(), "command": without_secrets(sys.argv)}
        config = self.output / "config.yaml"
        # Unresolved: `${oc.env:TOKEN}` stays what it says.
        loaded = OmegaConf.to_container(OmegaConf.load(config), resolve=False) if config.is_file() else {}
        write_whole(self.output / "provenance.json", json.dumps(facts, indent=2))
        for logger in trainer.loggers:
            logger.log_hyperparams({"config": without_secrets(loaded), "provenance": facts})


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path`, all of it or none."""
    part = path.with_name(f".{path.stem}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def revision(folder: Path) -> dict[str, Any]:
    """Git commit of the code in `folder`, and whether files differ from it; nothing outside a checkout."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"git_commit": commit, "git_changed": bool(changes)}


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def versions() -> dict[str, Any]:
    """Python's and the installed packages' versions."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), "platform": platform.platform(), "packages": found}


def without_secrets(value: Any) -> Any:
    """A copy of plain data, with values under secret-sounding keys and logins in URLs replaced by `***`."""
    if isinstance(value, Mapping):
        return {k: "***" if SECRET.search(str(k)) and v is not None else without_secrets(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(v) for v in value]
    if isinstance(value, str):
        key, sep, _ = value.partition("=")
        if sep and SECRET.search(key.rsplit(".", 1)[-1]):
            return f"{key}=***"
        return URL_LOGIN.sub("***@", value)
    return value
