"""`medclip train`: compose, instantiate, fit. What is trained is the config's business.

The run folder holds `config.yaml`, `checkpoints/`, `metrics.csv` and `skipped.jsonl`. `resume=auto` goes on from the
last checkpoint of the run folder (or starts afresh when there is none yet), `resume=PATH` from that file.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from medclip.config import build, output_folder, verb
from medclip.dry_run import dry_run
from medclip.types import UserError


def train(cfg: DictConfig) -> pl.Trainer:
    """Run one training from a composed config and return its trainer.

    Raises:
        UserError: whatever the user can mend: data, model, output folder, checkpoint.
    """
    rank = getattr(rank_zero_only, "rank", 0) or 0
    check_evals(cfg)
    folder = output_folder(cfg, resume=cfg.resume is not None, rank=rank)
    # Everything below interpolates `output`; a sweep's job has got a folder of its own.
    OmegaConf.update(cfg, "output", str(folder))
    checkpoint = find_checkpoint(cfg.resume, folder)
    _quiet()
    if not isinstance(cfg.seed, int) or not 0 <= cfg.seed < 2**32:
        raise UserError(f"seed={cfg.seed}: give a whole number from 0 to 2**32 - 1")
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    torch.set_float32_matmul_precision(cfg.matmul_precision)
    task: pl.LightningModule = build(cfg.task)
    data: pl.LightningDataModule = build(cfg.data)
    if cfg.resume is None and rank == 0:
        forget_run(folder)
    callbacks = list(build(cfg.callbacks).values())
    loggers = list(build(cfg.logger).values())
    trainer: pl.Trainer = build(cfg.trainer, callbacks=callbacks, logger=loggers)
    trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return trainer


def check_evals(cfg: DictConfig) -> None:
    """Refuse evaluations that nobody would run.

    Raises:
        UserError: `eval=[…]` without a callback for them.
    """
    if cfg.evals and "online" not in cfg.callbacks:
        raise UserError(
            f"eval={list(cfg.evals)} would not be run: say callbacks=[default,online] too (add best_online or "
            "early_stopping as you like), or leave eval= out"
        )


def find_checkpoint(resume: str | None, folder: Path) -> str | None:
    """The checkpoint to go on from: None for a new run.

    Raises:
        UserError: a named checkpoint does not exist.
    """
    if resume is None:
        return None
    if resume == "auto":
        last = folder / "checkpoints" / "last.ckpt"
        return str(last) if last.is_file() else None
    path = Path(resume).expanduser()
    if not path.is_file():
        raise UserError(f"resume={resume}: no such checkpoint (resume=auto takes the run folder's last one)")
    return str(path)


def forget_run(folder: Path) -> None:
    """Remove what an earlier run has left where a new one starts (`overwrite=true`).

    A run that is killed before its first checkpoint would else go on from the old run's, and its metrics, list of
    skipped samples and W&B run would continue the old ones; its best checkpoint and sheets of reconstructions would
    pass for the new run's.
    """
    for pattern in (
        *("checkpoints/last.ckpt", "checkpoints/best.ckpt", "reconstructions/*.png"),
        *("metrics.csv", "skipped.jsonl", "stream-*.jsonl", "wandb_id", "lineage.json"),
    ):
        for path in folder.glob(pattern):
            path.unlink()


def _quiet() -> None:
    """Keep the console for what the user must know: progress and remedies."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for text in (
        ".*LeafSpec.*",
        ".*Total length of .* across ranks is zero.*",
        ".*does not have many workers.*",
        ".*is smaller than the logging interval.*",
        ".*in eval mode at the start of training.*",  # what is locked
    ):
        warnings.filterwarnings("ignore", text)


@verb("train")
def main(cfg: DictConfig) -> None:
    """Train, or with `dry_run` say what it would take."""
    if cfg.dry_run:
        dry_run(cfg)
    else:
        train(cfg)


if __name__ == "__main__":
    main()
