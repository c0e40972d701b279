"""The best checkpoint so far, and the end of a run that gets no better: by the validation set, or by an evaluation.

A metric of the validation set is looked at when Lightning has validated (`ValidateByEpoch` says when); one that begins
with `eval/` when `online.OnlineEvaluation` has evaluated.

The published code of the chest X-ray recipe (arXiv:2210.12843) evaluates on the test set every ten epochs and reports
the best of these. Here only the validation set chooses; the test set is for `medclip evaluate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from medclip.callbacks.online import OnlineEvaluation
from medclip.types import UserError

EVAL = "eval/"


class BestCheckpoint(ModelCheckpoint):
    """One file, `dirpath/best.ckpt`, replaced when a validation or evaluation is better than all before it.

    What the untrained model scores is no candidate: the best is the best of the training.

    Args:
        dirpath: folder of the checkpoints.
        monitor: a metric that validation logs, or `eval/NAME/METRIC`, or `eval/score`.
        mode: whether more of it is better, or less.
    """

    def __init__(self, dirpath: str, monitor: str = "val/auroc", mode: Literal["min", "max"] = "max") -> None:
        super().__init__(
            dirpath=dirpath,
            filename="best",
            monitor=monitor,
            mode=mode,
            save_top_k=1,
            save_on_train_epoch_end=False,  # Lightning's epoch is the whole run
            enable_version_counter=False,
            auto_insert_metric_name=False,
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        assert self.monitor is not None
        if self.monitor.startswith(EVAL):
            check_evaluated(self.monitor, trainer, "callbacks.best.monitor")
        elif not trainer.val_dataloaders:
            raise UserError(
                "data.val_sources is empty, so that no best checkpoint can be chosen: name a validation set (never the "
                "test set), or leave the callback out: callbacks=[default]"
            )
        if self.best_model_score is None and trainer.is_global_zero:
            assert self.dirpath is not None
            (Path(self.dirpath) / "best.ckpt").unlink(missing_ok=True)  # of a run that this one overwrites

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self.monitor is not None
        if not self.monitor.startswith(EVAL):
            super().on_validation_end(trainer, pl_module)

    def evaluated(
        self,
        trainer: pl.Trainer,
        task: pl.LightningModule,
        metrics: Mapping[str, float],
        results: Any,
        *,
        started: bool,
    ) -> None:
        """Told by `OnlineEvaluation`."""
        assert self.monitor is not None
        if self.monitor.startswith(EVAL) and started and not self._should_skip_saving_checkpoint(trainer):
            check_metric(self.monitor, metrics, "callbacks.best.monitor")
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))


class EarlyStop(EarlyStopping):
    """Ends a run after `patience` validations or evaluations that were no better than the best before them.

    Args:
        monitor: as of `BestCheckpoint`.
        mode: whether more of it is better, or less.
        patience: validations, or evaluations, without a better one.
        min_delta: what counts as better.
        after: so many validations or evaluations are made whatever comes of them.
    """

    def __init__(
        self,
        monitor: str,
        mode: Literal["min", "max"] = "max",
        patience: int = 10,
        min_delta: float = 0.0,
        after: int = 0,
    ) -> None:
        super().__init__(
            monitor=monitor, mode=mode, patience=patience, min_delta=min_delta, check_on_train_epoch_end=False
        )
        self.after = after
        self.checks = 0

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"checks": self.checks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.checks = state_dict.get("checks", 0)

    def _evaluate_stopping_criteria(self, current: Tensor) -> tuple[bool, str | None]:
        self.checks += 1
        stop, why = super()._evaluate_stopping_criteria(current)
        patient = self.wait_count >= self.patience and self.checks <= self.after and bool(current.isfinite())
        return (False, None) if patient else (stop, why)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.monitor.startswith(EVAL):
            check_evaluated(self.monitor, trainer, "callbacks.early_stopping.monitor")
        # Resumed from the end of a run that was stopped.
        if self.wait_count >= self.patience and self.checks > self.after:
            trainer.should_stop = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.monitor.startswith(EVAL):
            super().on_validation_end(trainer, pl_module)

    def evaluated(
        self,
        trainer: pl.Trainer,
        task: pl.LightningModule,
        metrics: Mapping[str, float],
        results: Any,
        *,
        started: bool,
    ) -> None:
        """Told by `OnlineEvaluation`."""
        if self.monitor.startswith(EVAL) and started:
            check_metric(self.monitor, metrics, "callbacks.early_stopping.monitor")
            self._run_early_stopping_check(trainer)


def check_evaluated(monitor: str, trainer: pl.Trainer, key: str) -> None:
    """Refuse to wait for an evaluation that never comes.

    Raises:
        UserError: no evaluation during training, or none of that name.
    """
    online = [callback for callback in trainer.callbacks if isinstance(callback, OnlineEvaluation)]  # pyright: ignore
    if not online:
        raise UserError(f"{key}={monitor} needs evaluations during training: callbacks=[default,online,…] eval=[…]")
    names = [name for callback in online for name in callback.evals]
    if monitor.count("/") > 1 and monitor.split("/")[1] not in names:
        raise UserError(f"{key}={monitor} names no evaluation of this run: there are {', '.join(names)}")


def check_metric(monitor: str, metrics: Iterable[str], key: str) -> None:
    """Refuse a metric that no evaluation has.

    Raises:
        UserError: with those that there are.
    """
    if monitor not in metrics:
        raise UserError(f"{key}={monitor} is no metric of these evaluations: there are {', '.join(sorted(metrics))}")


class ValidateByEpoch(pl.Callback):
    """Validates after every `every` passes over the data.

    To Lightning a run is one epoch, whatever passes its stream has. A run that `max_steps` ends within its first pass
    is validated at its end.

    Args:
        epochs: passes of the whole run.
        every: passes between two validations.
    """

    def __init__(self, epochs: int, every: int = 1) -> None:
        if every < 1:
            raise UserError(f"callbacks.validation.every is {every}: give 1 or more passes over the data")
        self.epochs = epochs
        self.every = every

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        batches = max(1, round(trainer.num_training_batches / self.epochs) * self.every)
        if trainer.max_steps > 0:
            batches = min(batches, trainer.max_steps * trainer.accumulate_grad_batches)
        trainer.val_check_batch = batches
