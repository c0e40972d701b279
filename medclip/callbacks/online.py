"""Evaluations during training: those of `medclip evaluate`, on small sets, on the weights as they are.

Their metrics are logged as `eval/NAME/METRIC` beside the training's own, and `eval/score` is one number for all of
them. Callbacks with a method `evaluated` are told at once: the best checkpoint, early stopping, the pictures for W&B.

An evaluation comes at the end of an optimiser step, before any checkpoint of that step is written. So a checkpoint that
holds the step also holds what was concluded from it (the best score, the patience left), and a run that is killed amid
an evaluation goes on from an earlier step and evaluates that one again, with the same result. The generators are put
back afterwards, and no loader of the training is touched: losses are those of a run without evaluations, to the bit.

Rank 0 evaluates while the others wait, for the sets are small; all get its numbers. A sharded model needs every rank in
each forward pass: there all evaluate the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import fmean
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.strategies import FSDPStrategy, ModelParallelStrategy
from pytorch_lightning.utilities.seed import isolate_rng
from torch import nn

from medclip.types import UserError

SCORE = "eval/score"


class EvaluationResult(Protocol):
    """What is used of an evaluation's result; `details` is for whoever draws it."""

    headline: tuple[str, ...]
    lower_is_better: frozenset[str]
    details: Any

    @property
    def metrics(self) -> dict[str, float]: ...


Results = Mapping[str, EvaluationResult]


class OnlineEvaluation(pl.Callback):
    """Runs `evals` every so often, and after the last step.

    Args:
        evals: by name.
        run: (model, evals) -> results by name, as `medclip.evals.run.evaluate_checkpoint`.
        every_n_steps: optimiser steps between two evaluations; None for none by steps.
        every_n_epochs: passes over the data between two, where `every_n_steps` is None; None: at the end only.
        epochs: passes of the whole run.
        at_start: evaluate the untrained model too: what is to be gained on, and whether the evaluations work at all.

    Raises:
        UserError: no evaluation, or an interval below 1.
    """

    def __init__(
        self,
        evals: Mapping[str, Any],
        run: Callable[[Any, Mapping[str, Any]], Results],
        every_n_steps: int | None = None,
        every_n_epochs: int | None = 1,
        epochs: int = 1,
        at_start: bool = True,
    ) -> None:
        if not evals:
            raise UserError(
                "callbacks.online has nothing to evaluate: choose evaluations, e.g. eval=[zeroshot], and fill "
                "evals.zeroshot.data.sources"
            )
        for name, value in (("every_n_steps", every_n_steps), ("every_n_epochs", every_n_epochs)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UserError(f"callbacks.online.{name} is {value}: give a whole number of at least 1, or null")
        self.evals = dict(evals)
        self.run = run
        self.every_n_steps = every_n_steps
        self.every_n_epochs = every_n_epochs
        self.epochs = epochs
        self.at_start = at_start
        self._step = 0  # the last that was seen to its end
        self._evaluated: int | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # After all that has a say in the weights of a step (an average of them), before all that is saved of it. A new
        # list: the old one is being iterated over.
        others = [callback for callback in trainer.callbacks if callback is not self]  # pyright: ignore
        first = next((i for i, callback in enumerate(others) if isinstance(callback, Checkpoint)), len(others))
        trainer.callbacks = [*others[:first], self, *others[first:]]  # pyright: ignore

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step
        self._evaluated = trainer.global_step or None  # of a resumed run: that step's evaluation is over
        if self.at_start and trainer.global_step == 0:
            self._evaluate(trainer, pl_module, started=False)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # amid an accumulation of gradients
            return
        self._step = trainer.global_step
        last = trainer.global_step >= trainer.estimated_stepping_batches
        if last or self._due(trainer):
            self._evaluate(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._evaluated != trainer.global_step and trainer.global_step > 0:  # ended before its time, by max_time
            self._evaluate(trainer, pl_module)

    def _due(self, trainer: pl.Trainer) -> bool:
        if self.every_n_steps is not None:
            return trainer.global_step % self.every_n_steps == 0
        if self.every_n_epochs is None:
            return False
        steps = trainer.num_training_batches / trainer.accumulate_grad_batches / self.epochs
        return trainer.global_step % max(1, round(steps * self.every_n_epochs)) == 0

    def _evaluate(self, trainer: pl.Trainer, task: pl.LightningModule, *, started: bool = True) -> None:
        self._evaluated = trainer.global_step
        for callback in trainer.callbacks:  # pyright: ignore
            if (hear := getattr(callback, "evaluating", None)) is not None:
                hear(trainer, task)
        metrics: dict[str, float] = {}
        results: Results = {}
        sharded = isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy)
        if trainer.is_global_zero or sharded:
            with _as_evaluated(task, trainer):
                results = self.run(task.model, self.evals)
            metrics = scalars(results)
        # All ranks decide by rank 0's numbers, and so alike.
        metrics = trainer.strategy.broadcast(metrics)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        # The step that Lightning gives to what it logs of a validation after this one.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
        for callback in trainer.callbacks:  # pyright: ignore
            if (hear := getattr(callback, "evaluated", None)) is not None:
                hear(trainer, task, metrics, results, started=started)


def scalars(results: Results) -> dict[str, float]:
    """`eval/NAME/METRIC` of each evaluation, single classes left out, and `eval/score`.

    The score is the mean over evaluations of the mean of their headline metrics; those of which less is better, and
    those that are undefined on this set, are left out.
    """
    found: dict[str, float] = {}
    means = []
    for name, result in results.items():
        metrics = {metric: value for metric, value in result.metrics.items() if ":" not in metric}
        found |= {f"eval/{name}/{metric}": value for metric, value in metrics.items()}
        headline = [metrics[m] for m in result.headline if m in metrics and m not in result.lower_is_better]
        if defined := [value for value in headline if value == value]:
            means.append(fmean(defined))
    return found | ({SCORE: fmean(means)} if means else {})


@contextmanager
def _as_evaluated(task: pl.LightningModule, trainer: pl.Trainer) -> Iterator[None]:
    """The model as a validation has it, and afterwards every module's mode and all generators as they were."""
    modes: dict[nn.Module, bool] = {module: module.training for module in task.modules()}
    task.eval()
    try:
        with isolate_rng(), trainer.precision_plugin.forward_context(), torch.inference_mode():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
