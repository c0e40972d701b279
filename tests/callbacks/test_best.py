"""`best.ckpt` is that of the best validation, and validation comes once a pass over the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from medclip.callbacks.best import BestCheckpoint, ValidateByEpoch
from medclip.callbacks.storage import AtomicCheckpointIO
from medclip.types import UserError


class Scored(pl.LightningModule):
    """Its weight counts steps; its validation scores come from a list."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.steps = torch.nn.Parameter(torch.zeros(1))
        self.scores, self.validated = scores, []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return -self.steps.sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(self.trainer.global_step)
        self.log("val/auroc", self.scores[len(self.validated) - 1], batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def fit(
    folder: Path, model: Scored, *callbacks: pl.Callback, batches: int = 12, val: bool = True, **options: Any
) -> None:
    pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=list(callbacks),
        plugins=[AtomicCheckpointIO()],
        logger=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **{"enable_checkpointing": any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks), **options},
    ).fit(model, [0] * batches, [0] if val else None)


def test_the_best_validation_is_kept(tmp_path: Path):
    model = Scored([0.6, 0.9, 0.7, 0.8])
    fit(tmp_path, model, ValidateByEpoch(epochs=4), BestCheckpoint(str(tmp_path)))
    assert model.validated == [3, 6, 9, 12]
    assert [path.name for path in tmp_path.iterdir()] == ["best.ckpt"]
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert saved["global_step"] == 6 and saved["state_dict"]["steps"].item() == 6


@pytest.mark.parametrize(
    ("epochs", "every", "max_steps", "expected"),
    [(4, 2, -1, [6, 12]), (3, 1, -1, [4, 8, 12]), (1, 1, -1, [12]), (4, 1, 2, [2]), (4, 1, 7, [3, 6])],
)
def test_validation_comes_by_passes(epochs, every, max_steps, expected, tmp_path: Path):
    model = Scored([0.5] * 12)
    fit(tmp_path, model, ValidateByEpoch(epochs, every), max_steps=max_steps)
    assert model.validated == expected


def test_a_resumed_run_remembers_the_best(tmp_path: Path):
    """Its first validation is worse than the best before the kill: best.ckpt stays."""
    best = BestCheckpoint(str(tmp_path))
    first = Scored([0.9])
    fit(tmp_path, first, ValidateByEpoch(epochs=4), best, max_steps=3)
    resumed = BestCheckpoint(str(tmp_path))
    resumed.load_state_dict(best.state_dict())
    fit(tmp_path, Scored([0.7, 0.8, 0.6, 0.5]), ValidateByEpoch(epochs=4), resumed)
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"] == 3


def test_the_best_of_an_overwritten_run_is_removed(tmp_path: Path):
    (tmp_path / "best.ckpt").write_text("of another run")
    with pytest.raises(ZeroDivisionError):

        class Dies(pl.Callback):
            def on_train_batch_start(self, *args: Any) -> None:
                raise ZeroDivisionError

        fit(tmp_path, Scored([0.5]), Dies(), BestCheckpoint(str(tmp_path)))
    assert not (tmp_path / "best.ckpt").exists()


def test_without_a_validation_set_there_is_no_best(tmp_path: Path):
    with pytest.raises(UserError, match=r"data\.val_sources is empty.*never the test set"):
        fit(tmp_path, Scored([]), BestCheckpoint(str(tmp_path)), val=False)


def test_every_must_be_a_number_of_passes():
    with pytest.raises(UserError, match=r"callbacks\.validation\.every is 0"):
        ValidateByEpoch(epochs=3, every=0)
