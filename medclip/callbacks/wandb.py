"""Weights & Biases where it can be reached, an offline run in the run folder where not."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit

from pytorch_lightning.loggers import WandbLogger

from medclip.types import UserError


def wandb_logger(save_dir: str, project: str, name: str | None = None, **options: object) -> WandbLogger:
    """A WandbLogger that never asks for a login, and that a resumed run continues.

    Offline unless there is a key; `wandb sync` sends such a run later. WANDB_MODE, where set, decides instead.

    Raises:
        UserError: wandb is not installed.
    """
    folder = Path(save_dir)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return WandbLogger(
            save_dir=str(folder),
            project=project,
            name=name,
            id=_run_id(folder / "wandb_id"),
            resume="allow",
            offline=offline(),
            log_model=False,
            **options,  # type: ignore[arg-type]
        )
    except ModuleNotFoundError as error:
        raise UserError("logger=wandb needs the wandb package: pip install wandb, or choose logger=[csv]") from error


def offline() -> bool:
    """Whether runs stay on this machine: by WANDB_MODE, else for want of a key."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode != "online"
    return not has_key()


def has_key() -> bool:
    """Whether WANDB_API_KEY or the user's netrc holds a key for the server."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _run_id(path: Path) -> str:
    """The folder's run id, made on first use."""
    if not path.is_file():
        path.write_text(os.urandom(4).hex())
    return path.read_text().strip()
