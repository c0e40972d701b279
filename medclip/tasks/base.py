"""What all tasks share: built parts, weighted loss terms, the optimiser, and a checkpoint that says what it is of.

Model, losses, optimiser and schedule come built from the config; no task imports any of them. A model is a module
`Batch -> output` with `.description`, plain data that says what it is; a loss is a module `(output, Batch) -> scalar`.

Nothing random is carried from step to step: the generators are seeded anew for each step from (seed, epoch, batch,
rank), so that dropout, drop path and masks after a resume are those of the uninterrupted run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from medclip.types import Batch, UserError

Optimizer = Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer]
Schedule = Callable[[torch.optim.Optimizer, int], torch.optim.lr_scheduler.LRScheduler]


class Task(pl.LightningModule):
    """A training without its steps.

    Args:
        model: `Batch -> output`.
        losses: named terms, each `(out, batch) -> scalar`.
        weights: of terms that do not count 1.
        optimizer: named parameters -> optimiser.
        schedule: (optimiser, number of optimiser steps) -> learning-rate scheduler, stepped after each of them.
        lr_batch: the optimiser's learning rate is for so many samples a step; it is scaled with the number there are,
            over all ranks and accumulated batches (Goyal et al. 2017, arXiv:1706.02677). None: it holds as it is.
        seed: of dropout and the like.
    """

    weights_key = "model.pretrained"  # where a new run is told to start from a checkpoint's weights

    def __init__(
        self,
        model: nn.Module,
        losses: Mapping[str, nn.Module],
        optimizer: Optimizer,
        schedule: Schedule,
        weights: Mapping[str, float] | None = None,
        lr_batch: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not losses:
            raise UserError("there is no loss term: choose one, e.g. loss=[clip]")
        if unknown := set(weights or {}) - set(losses):
            raise UserError(f"loss.weights names {sorted(unknown)}, but the loss terms are {sorted(losses)}")
        if lr_batch is not None and lr_batch < 1:
            raise UserError(f"task.lr_batch is {lr_batch}: give the samples a step that optim.lr is for, or null")
        self.model = model
        self.losses = nn.ModuleDict(losses)
        self.weights = dict(weights or {})
        self.optimizer = optimizer
        self.schedule = schedule
        self.lr_batch = lr_batch
        self.seed = seed

    def weigh(self, out: Any, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """The loss terms and their weighted sum."""
        terms = {name: term(out, batch) for name, term in self.losses.items()}
        return terms, torch.stack([self.weights.get(name, 1.0) * value for name, value in terms.items()]).sum()

    def configure_optimizers(self) -> Any:
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise UserError("training would never end: set epochs or max_steps")
        trainable = ((name, p) for name, p in self.named_parameters() if p.requires_grad)
        try:
            optimizer = self.optimizer(trainable)
        except (TypeError, ValueError) as error:  # a setting that the optimiser does not know or take
            raise UserError(f"optim cannot be built: {error} (see optim in `--cfg job`)") from error
        if self.lr_batch is not None:
            for group in optimizer.param_groups:
                group["lr"] *= self.samples_a_step() / self.lr_batch
        return [optimizer], [{"scheduler": self.schedule(optimizer, int(steps)), "interval": "step"}]

    def samples_a_step(self) -> int:
        """Samples of one optimiser step: all ranks, all batches whose gradients are accumulated.

        Raises:
            UserError: the data do not say how large a batch is.
        """
        size = getattr(getattr(self.trainer, "datamodule", None), "batch_size", None)
        if size is None:
            raise UserError("task.lr_batch needs data that have a batch_size: say task.lr_batch=null")
        return size * self.trainer.world_size * self.trainer.accumulate_grad_batches

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning refuses to clip for a fused optimiser under any mixed precision. Where no scaler is at work (bf16),
        # the gradients are what they seem.
        if gradient_clip_val and self.trainer.scaler is None and gradient_clip_algorithm != "value":
            self.log("train/grad_norm", _whole(nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)))
            return
        every = self.trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        if every and (self.global_step + 1) % every == 0:  # a pass over all gradients, only where it will be seen
            grads = [p.grad for p in self.parameters() if p.grad is not None]
            self.log("train/grad_norm", _whole(nn.utils.get_total_norm(grads)))
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["medclip"] = self.model.description

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model, naming the first difference.

        Raises:
            UserError: the checkpoint is not of this model.
        """
        theirs, ours = (_without_origin(it) for it in (checkpoint.get("medclip"), self.model.description))
        if difference := first_difference(theirs, ours):
            raise UserError(
                f"cannot resume: the checkpoint is of another model ({difference}); choose the model of that run (its "
                f"config.yaml says which), or start a new run from its weights with {self.weights_key}=CHECKPOINT"
            )


def real_rows(batch: Batch) -> int:
    """Rows that hold a sample; the rest is padding."""
    return len(batch["key"])  # pyright: ignore[reportTypedDictNotRequiredAccess]


def _whole(norm: Tensor) -> Tensor:
    """Over all ranks, where each holds a part of the gradients (FSDP)."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _without_origin(description: Any) -> Any:
    """The same model may have been named by another path."""
    return {k: v for k, v in description.items() if k != "origin"} if isinstance(description, Mapping) else description


def first_difference(theirs: Any, ours: Any, path: str = "") -> str:
    """Where two pieces of plain data first differ, in words; "" where they are equal."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        for key in sorted(set(theirs) | set(ours), key=str):
            if found := first_difference(theirs.get(key), ours.get(key), f"{path}.{key}" if path else str(key)):
                return found
        return ""
    if theirs == ours:
        return ""
    return f"{path or 'description'}: {_short(theirs)} there, {_short(ours)} here"


def _short(value: Any, most: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= most else text[: most - 1] + "…"
