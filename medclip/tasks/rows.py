"""Training by a loss that is a mean over samples: nothing is gathered, padding is left out, and ranks count by rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from medclip.tasks.base import Task, real_rows
from medclip.tasks.gather import count_real
from medclip.tasks.seed import seed_step
from medclip.types import Batch


class RowTask(Task):
    """One step of such a training. The model returns a tensor, or a NamedTuple of tensors, with a row a sample."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        seed_step(self.seed, self.current_epoch, batch_idx, self.global_rank)
        _, terms, total = self.score(batch)
        n = real_rows(batch)
        rate = max(group["lr"] for group in self.optimizers(use_pl_optimizer=False).param_groups)  # pyright: ignore
        values = {f"train/{name}": value.detach() for name, value in {"loss": total, **terms}.items()}
        self.log_dict({**values, "train/lr": rate}, batch_size=max(n, 1))
        counts = count_real(n, total.device)
        # DDP takes the mean over ranks, and the last batch of an epoch has fewer rows on some.
        return total * (n * len(counts) / max(1, sum(counts)))

    def score(self, batch: Batch) -> tuple[Any, dict[str, Tensor], Tensor]:
        """This rank's output without padding, the loss terms, and their weighted sum."""
        n = real_rows(batch)
        out = self.model(batch)
        if n == 0:
            # Every sample was bad: a zero that keeps the graph keeps DDP in step.
            return rows(out, 0), {}, (out[0] if isinstance(out, tuple) else out).sum() * 0
        out = rows(out, n)
        real: Any = {key: value[:n] if isinstance(value, Tensor) else value for key, value in batch.items()}
        return out, *self.weigh(out, real)

    def log_validation(self, terms: dict[str, Tensor], total: Tensor, n: int) -> None:
        """Log the mean over the rows of all ranks; all ranks must call it, also one without rows."""
        counts = count_real(n, total.device)
        if sum(counts) == 0:
            return
        values = torch.stack([total, *(terms[name] if n else total for name in self.losses)]).detach() * n
        if len(counts) > 1:
            dist.all_reduce(values)
        names = [f"val/{name}" for name in ("loss", *self.losses)]
        self.log_dict(dict(zip(names, values / sum(counts), strict=True)), batch_size=sum(counts))


def rows(out: Any, n: int) -> Any:
    """The first `n` rows of a tensor, or of each tensor of a NamedTuple."""
    return out._make(x[:n] for x in out) if isinstance(out, tuple) else out[:n]  # pyright: ignore
