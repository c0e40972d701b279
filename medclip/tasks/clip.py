"""Contrastive training of a CLIP: towers, gathered features, named loss terms, their weighted sum.

Model, losses, optimiser and schedule come built from the config; this file imports none of them. The model is a module
`Batch -> ClipOutput` with `.logit_scale` (a parameter, in log space) and `.description` (plain data that says what it
is); a loss is a module `(ClipOutput, Batch) -> scalar`.

Nothing random is carried from step to step: the generators are seeded anew for each step from (seed, epoch, batch,
rank), so that dropout and drop path after a resume are those of the uninterrupted run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from medclip.tasks.gather import gather
from medclip.types import Batch, ClipOutput, UserError

Optimizer = Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer]
Schedule = Callable[[torch.optim.Optimizer, int], torch.optim.lr_scheduler.LRScheduler]


class ClipTask(pl.LightningModule):
    """One contrastive step.

    Args:
        model: `Batch -> ClipOutput`.
        losses: named terms, each `(out, batch) -> scalar` on the global batch.
        weights: of terms that do not count 1.
        optimizer: named parameters -> optimiser.
        schedule: (optimiser, number of optimiser steps) -> learning-rate scheduler, stepped after each of them.
        max_logit_scale: upper bound of the (exponentiated) logit scale; CLIP, section 2.5.
        seed: of dropout and the like.
    """

    def __init__(
        self,
        model: nn.Module,
        losses: Mapping[str, nn.Module],
        optimizer: Optimizer,
        schedule: Schedule,
        weights: Mapping[str, float] | None = None,
        max_logit_scale: float = 100.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not losses:
            raise UserError("there is no loss term: choose one, e.g. loss=[clip]")
        if unknown := set(weights or {}) - set(losses):
            raise UserError(f"loss.weights names {sorted(unknown)}, but the loss terms are {sorted(losses)}")
        if max_logit_scale <= 0:
            raise UserError(f"task.max_logit_scale is {max_logit_scale}: it must be above 0 (CLIP has 100)")
        self.model = model
        self.losses = nn.ModuleDict(losses)
        self.weights = dict(weights or {})
        self.optimizer = optimizer
        self.schedule = schedule
        self.max_logit_scale = max_logit_scale
        self.seed = seed

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        seed_step(self.seed, self.current_epoch, batch_idx, self.global_rank)
        out, terms, total = self.score(batch)
        values = {"loss": total, **terms, "logit_scale": out.logit_scale}
        self.log_dict({f"train/{name}": value.detach() for name, value in values.items()}, batch_size=real_rows(batch))
        return total

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        out, terms, total = self.score(batch)
        n = len(out.image_features)
        if n == 0:
            return
        values = {"loss": total, **terms, **retrieval_accuracy(out)}
        # Gathered: every rank has the same values already.
        self.log_dict({f"val/{name}": value for name, value in values.items()}, batch_size=n)

    def score(self, batch: Batch) -> tuple[ClipOutput, dict[str, Tensor], Tensor]:
        """The global batch's output, the loss terms, and their weighted sum."""
        out = gather(self.model(batch), real_rows(batch))
        if len(out.image_features) == 0:
            # Every sample on every rank was bad. All ranks know; a zero that keeps the graph keeps DDP in step.
            return out, {}, torch.stack([x.sum() * 0 for x in out if x is not None]).sum()
        terms = {name: term(out, batch) for name, term in self.losses.items()}
        total = torch.stack([self.weights.get(name, 1.0) * value for name, value in terms.items()]).sum()
        return out, terms, total

    def configure_optimizers(self) -> Any:
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise UserError("training would never end: set epochs or max_steps")
        trainable = ((name, p) for name, p in self.named_parameters() if p.requires_grad)
        try:
            optimizer = self.optimizer(trainable)
        except (TypeError, ValueError) as error:  # a setting that the optimiser does not know or take
            raise UserError(f"optim cannot be built: {error} (see optim in `--cfg job`)") from error
        return [optimizer], [{"scheduler": self.schedule(optimizer, int(steps)), "interval": "step"}]

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning refuses to clip for a fused optimiser under any mixed precision. Where no scaler is at work (bf16),
        # the gradients are what they seem.
        if self.trainer.scaler is not None or gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            norm = nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)
            self.log("train/grad_norm", norm)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        # Here, not in a batch-end hook: callbacks come first there, and would save the scale unclamped.
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=math.log(self.max_logit_scale))  # type: ignore[operator, union-attr]

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
                "config.yaml says which), or start a new run from its weights with model.pretrained=CHECKPOINT"
            )


def real_rows(batch: Batch) -> int:
    """Rows that hold a sample; the rest is padding."""
    return len(batch["key"])  # pyright: ignore[reportTypedDictNotRequiredAccess]


def seed_step(seed: int, epoch: int, batch: int, rank: int) -> None:
    """Seed torch's generators (CPU and devices) for one step of one rank."""
    state = np.random.SeedSequence([seed, epoch, batch, rank]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(state))


def retrieval_accuracy(out: ClipOutput) -> dict[str, Tensor]:
    """Share of rows whose own partner is the nearest one within the batch, both ways."""
    similarity = out.image_features @ out.text_features.T
    target = torch.arange(len(similarity), device=similarity.device)
    return {
        "image_to_text_r1": (similarity.argmax(1) == target).float().mean(),
        "text_to_image_r1": (similarity.argmax(0) == target).float().mean(),
    }


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
