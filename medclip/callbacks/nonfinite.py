"""A step whose loss or gradient is not finite changes nothing: no weight, no moment of the optimiser, no batch norm.

One bad sample or an overflow would otherwise turn every weight into NaN. The decision is made on the device, from the
gradients after DDP has averaged them, and is the same on all ranks. A fused optimiser obeys it there (`found_inf`, as a
gradient scaler tells it), so that the host need not wait for the device; it reads each decision one step later. Under
accumulation the whole step is skipped. The learning rate's schedule goes on: it counts steps of the run.

`precision=16-mixed` has a gradient scaler that skips by itself, and expects to: there nothing is done.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from medclip.types import UserError


@dataclass
class _Decision:
    """Of one step: 1 where it was skipped, on its way to the host, and whose step it was."""

    flag: Tensor
    arrived: Any  # torch.cuda.Event
    step: int
    keys: list[str]

    def skipped(self) -> bool:
        if self.arrived is not None:
            self.arrived.synchronize()
        return bool(self.flag)


class NonFiniteGuard(pl.Callback):
    """Skips such steps, counts them in `train/skipped_steps`, names their samples, and ends a run that has only them.

    Args:
        patience: so many in a row end the run.
        keys: how many samples of the batch are named in the warning.
    """

    def __init__(self, patience: int = 10, keys: int = 8) -> None:
        if patience < 1:
            raise UserError(f"callbacks.nonfinite.patience is {patience}: give the skipped steps in a row, 1 or more")
        self.patience = patience
        self.keys = keys
        self.skipped = 0
        self.in_a_row = 0
        self._bad: Tensor | None = None  # some loss of this step was not finite
        self._batch: list[str] = []
        self._norms: list[Tensor] = []
        self._saved: list[Tensor] = []
        self._pending: _Decision | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        norms = [module for module in pl_module.modules() if isinstance(module, _NormBase)]
        self._norms = [buffer for module in norms for buffer in module.buffers(recurse=False)]
        self._begin()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._bad is None:
            self._saved = [buffer.clone() for buffer in self._norms]
        self._batch += batch["key"]

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        bad = ~loss.detach().isfinite()
        self._bad = bad if self._bad is None else self._bad | bad

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._settle()
        if self.in_a_row >= self.patience:
            self._stop()
        if trainer.scaler is None:
            flag = self._decide(optimizer)
            _skip(optimizer, flag)
            for buffer, saved in zip(self._norms, self._saved, strict=True):
                buffer.copy_(torch.where(flag > 0, saved, buffer))
            self._pending = _send(flag, trainer.global_step, self._batch)
        self._begin()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        pl_module.log("train/skipped_steps", float(self.skipped), batch_size=1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._settle()
        if self.in_a_row >= self.patience:
            self._stop()

    def state_dict(self) -> dict[str, Any]:
        self._settle()
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]

    def _begin(self) -> None:
        self._bad, self._batch = None, []

    def _decide(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """1.0 where any rank saw a loss or a gradient that is not finite, else 0.0; a scalar on the device."""
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        own = [g.to_local() if hasattr(g, "to_local") else g for g in grads]  # FSDP's are shards
        bad = ~torch.nn.utils.get_total_norm(own).isfinite()
        flag = (bad if self._bad is None else self._bad | bad.to(self._bad.device)).float()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        return flag

    def _settle(self) -> None:
        """Read the last step's decision."""
        if self._pending is None:
            return
        last, self._pending = self._pending, None
        if not last.skipped():
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        more = f" and {len(last.keys) - self.keys} more" if len(last.keys) > self.keys else ""
        print(
            f"step {last.step} skipped: its loss or gradient is not finite; samples: "
            f"{', '.join(last.keys[: self.keys])}{more}",
            file=sys.stderr,
            flush=True,
        )

    def _stop(self) -> None:
        raise UserError(
            f"{self.in_a_row} steps in a row had a loss or gradient that is not finite: lower optim.lr, choose "
            "trainer.precision=bf16-mixed or 32-true, look at the samples named above, or raise "
            "callbacks.nonfinite.patience"
        )


def _skip(optimizer: torch.optim.Optimizer, flag: Tensor) -> None:
    """Have the coming `optimizer.step` do nothing where `flag` is 1."""
    fused: Any = optimizer
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        fused.found_inf = flag
    elif bool(flag):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = None


def _send(flag: Tensor, step: int, keys: list[str]) -> _Decision:
    if not flag.is_cuda:
        return _Decision(flag, None, step, keys)
    host = torch.empty((), pin_memory=True).copy_(flag, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return _Decision(host, arrived, step, keys)
