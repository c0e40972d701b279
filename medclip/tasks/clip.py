"""Contrastive training of a CLIP: towers, gathered features, named loss terms, their weighted sum.

The model is a module `Batch -> ClipOutput` with `.logit_scale` (a parameter, in log space); a loss sees the global
batch: `(ClipOutput, Batch) -> scalar`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from medclip.tasks.base import Optimizer, Schedule, Task, real_rows
from medclip.tasks.gather import gather
from medclip.tasks.seed import seed_step
from medclip.types import Batch, ClipOutput, UserError


class ClipTask(Task):
    """One contrastive step.

    Args:
        model: `Batch -> ClipOutput`.
        losses: named terms, each `(out, batch) -> scalar` on the global batch.
        optimizer: see `Task`, as `schedule`, `weights` and the other options.
        max_logit_scale: upper bound of the (exponentiated) logit scale; CLIP, section 2.5.
    """

    def __init__(
        self,
        model: nn.Module,
        losses: Mapping[str, nn.Module],
        optimizer: Optimizer,
        schedule: Schedule,
        max_logit_scale: float = 100.0,
        **options: Any,
    ) -> None:
        super().__init__(model, losses, optimizer, schedule, **options)
        if max_logit_scale <= 0:
            raise UserError(f"task.max_logit_scale is {max_logit_scale}: it must be above 0 (CLIP has 100)")
        self.max_logit_scale = max_logit_scale

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
        return out, *self.weigh(out, batch)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        # Here, not in a batch-end hook: callbacks come first there, and would save the scale unclamped.
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=math.log(self.max_logit_scale))  # type: ignore[operator, union-attr]


def retrieval_accuracy(out: ClipOutput) -> dict[str, Tensor]:
    """Share of rows whose own partner is the nearest one within the batch, both ways."""
    similarity = out.image_features @ out.text_features.T
    target = torch.arange(len(similarity), device=similarity.device)
    return {
        "image_to_text_r1": (similarity.argmax(1) == target).float().mean(),
        "text_to_image_r1": (similarity.argmax(0) == target).float().mean(),
    }
