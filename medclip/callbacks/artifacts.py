"""Where a run's checkpoints come from and what they become, as W&B's graph of artifacts.

The run uses a data set, `data-KEYS`: an artifact of metadata alone, what `lineage.json` says of the sources (their
addresses, filters, counts, licences and a digest of the keys). It uses the checkpoints that it starts from, and logs
its own `last.ckpt` and `best.ckpt`. An artifact of a checkpoint is a small file that says which one it is (name,
SHA-256, bytes, step): two runs that mean the same checkpoint share it, which draws the line from one to the other. The
weights themselves are uploaded only where asked.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from medclip.callbacks.media import require_wandb, wandb_loggers


class Artifacts(pl.Callback):
    """Declares what the run uses when it starts, and its checkpoints when it ends.

    Args:
        output: the run folder.
        bases: what the weights were loaded from: checkpoints, folders, hub names; None where nothing was.
        upload: send the checkpoints' weights too.
    """

    def __init__(self, output: str, bases: Sequence[Any] = (), upload: bool = False) -> None:
        self.folder = Path(output)
        self.bases = list(dict.fromkeys(_named(base) for base in bases if base))
        self.upload = upload
        self._declared = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        require_wandb(trainer, "callbacks.artifacts")
        self._declared = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Not before: the lineage is made as the training starts. Each leg of a run says it, for a leg that was killed
        # may have lost it, and it is the same artifact each time.
        if self._declared or not trainer.is_global_zero:
            return
        self._declared = True
        lineages = [getattr(callback, "lineage", None) for callback in trainer.callbacks]  # pyright: ignore
        for logger in wandb_loggers(trainer):
            for lineage in lineages:
                if isinstance(lineage, Mapping) and lineage.get("sources"):
                    use(logger.experiment, dataset_artifact(lineage))
            for base in self.bases:
                use(logger.experiment, checkpoint_artifact(base, upload=self.upload))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        for logger in wandb_loggers(trainer):
            for name in ("best", "last"):
                path = self.folder / "checkpoints" / f"{name}.ckpt"
                if path.is_file():
                    artifact = checkpoint_artifact(str(path), upload=self.upload)
                    logger.experiment.log_artifact(artifact, aliases=[name])


def dataset_artifact(lineage: Mapping[str, Any]) -> Any:
    """An artifact of a run's data: metadata alone, named after the digest of the keys."""
    import wandb

    about = {"keys": lineage.get("keys"), "sources": lineage["sources"]}
    artifact = wandb.Artifact(f"data-{str(about['keys'])[:12]}", "dataset", metadata={"keys": about["keys"]})
    _write(artifact, "sources.json", about)
    artifact.metadata = {**artifact.metadata, "samples": sum(int(s.get("samples", 0)) for s in about["sources"])}
    return artifact


def checkpoint_artifact(where: str, *, upload: bool = False) -> Any:
    """An artifact of a checkpoint file, or of a model that is known by its name.

    A checkpoint in a run folder is named after that run's id, so that all of a run's are versions of one.
    """
    import wandb

    path = Path(where.removeprefix("local-dir:")).expanduser()
    if not path.is_file():
        name = path.name if path.exists() else where
        artifact = wandb.Artifact(f"base-{_slug(name)}", "model", metadata={"name": name})
        _write(artifact, "model.json", {"name": name})
        return artifact
    about = describe(path)
    run = path.parent.parent / "wandb_id"
    name = f"checkpoint-{run.read_text().strip()}" if run.is_file() else f"base-{about['sha256'][:12]}"
    artifact = wandb.Artifact(name, "model", metadata=about)
    _write(artifact, "checkpoint.json", about)
    if upload:
        artifact.add_file(str(path), name=path.name)
    return artifact


def describe(path: Path) -> dict[str, Any]:
    """Which file it is: `{file, bytes, sha256, step}`; the step is None where it is no checkpoint of a training."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        content = torch.load(path, map_location="meta", weights_only=True, mmap=True)
        step = content.get("global_step") if isinstance(content, Mapping) else None
    except Exception:  # the unpickler raises almost anything on what is no checkpoint; whoever loads it says so
        step = None
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest, "step": step}


def use(run: Any, artifact: Any) -> None:
    """Declare `artifact` an input of the run, offline too.

    W&B's own `use_artifact` refuses to offline, though its log can hold it: this is what it calls for a new artifact.
    """
    if run.offline:
        run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
    else:
        run.use_artifact(artifact)


def _named(base: Any) -> str:
    return str(base.get("pretrained") if isinstance(base, Mapping) else base)


def _slug(name: str) -> str:
    """What W&B takes as an artifact's name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name)[-100:].strip("-")


def _write(artifact: Any, name: str, content: Any) -> None:
    with artifact.new_file(name, encoding="utf-8") as file:
        json.dump(content, file, indent=1, ensure_ascii=False, sort_keys=True)
