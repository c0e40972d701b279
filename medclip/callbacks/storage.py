"""Checkpoint files that are whole or not there, and that hold plain data only.

Lightning 2.6 writes to the system's temporary folder and moves the file: onto another file system that is a plain copy,
and a machine that stops in it leaves half a checkpoint under the good name. Here the file is written beside its place,
flushed to the disk and renamed, so that the old checkpoint stands until the new one is complete.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO

from medclip.types import UserError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Local checkpoints by temporary file, fsync and rename; read with `weights_only`, so that none can run code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`, wholly or not at all.

        Raises:
            UserError: the disk is full or not writable; an older checkpoint is still there.
        """
        path = Path(path)
        part = path.with_name(f".{path.name}.part")  # one writer (rank 0); what a killed run left is overwritten
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            _sync_folder(path.parent)
        except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into a RuntimeError
            part.unlink(missing_ok=True)
            raise UserError(f"cannot write checkpoint {path} ({error}): free some space, or move `output=`") from error

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint to the CPU; `weights_only` holds whatever is asked.

        Raises:
            UserError: there is no such file, or it is not a whole checkpoint of plain data.
        """
        try:
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
        except FileNotFoundError as error:
            raise UserError(f"checkpoint {path} does not exist") from error
        except Exception as error:  # the unpickler raises almost anything on a file that is none of its own
            raise UserError(f"{path} is no readable checkpoint (cut short, or no plain data): use another") from error
        if not isinstance(checkpoint, dict) or not {"state_dict", "pytorch-lightning_version"} <= checkpoint.keys():
            raise UserError(
                f"{path} is no checkpoint of `medclip train`: it holds no training state (weights alone are for "
                "model.pretrained=)"
            )
        return checkpoint


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
