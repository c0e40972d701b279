"""An exponential moving average of what is trained, which validation, evaluation and every checkpoint see.

Polyak and Juditsky 1992; as in Tarvainen and Valpola 2017, arXiv:1703.01780. After optimiser step t (1, 2, …)

    average += (1 - d) * (weights - average),   d = min(decay, (1 + t) / (10 + t))

starting from the weights that training starts from; the second term, TensorFlow's, lets a short run forget those.

Lightning 2.6's EMAWeightAveraging averages a copy of the whole module, frozen towers too, as d * a + (1 - d) * w: by
rounding alone a sixth of the frozen weights moves in 20 000 steps. It also leaves the averaged weights in place of the
trained ones in the checkpoint that ends a run. Here only what is trained has an average, and what does not change is
its own average to the bit.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor

from medclip.types import UserError


class Ema(pl.Callback):
    """Averages trainable parameters and the buffers of floats that are saved (statistics of batch norms), in float32.

    A checkpoint's `state_dict` holds the averages, its `ema` the weights from which a resumed run goes on. The module
    holds the averages during validation and evaluation, and when the fit is over.

    Args:
        decay: d once the run has gone on for long; about 1 / (1 - d) steps count.

    Raises:
        UserError: `decay` is not in 0..1; a strategy that shards the weights.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"callbacks.ema.decay is {decay}: give a number from 0 to below 1, such as 0.999")
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}  # the module's own, by their names in its state dict
        self._trained: dict[str, Tensor] | None = None  # set aside while the module holds the averages
        self._step = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            raise UserError(
                "callbacks=[ema] needs whole weights in each process: leave it out, or say trainer.strategy=ddp"
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loaded, self._step = self.average, trainer.global_step
        self._weights = _averaged(pl_module)
        # float32 whatever the weights are: in bfloat16 a step of 1/1000 of the difference would be lost.
        self.average = {
            name: loaded.get(name, value).detach().to(value.device, torch.float32, copy=True)
            for name, value in self._weights.items()
        }

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._step:  # amid an accumulation of gradients
            return
        self._step = step
        decay = min(self.decay, (1 + step) / (10 + step))
        with torch.no_grad():
            weights = [value.to(torch.float32) for value in self._weights.values()]
            torch._foreach_lerp_(list(self.average.values()), weights, 1 - decay)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._show()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore()

    def evaluating(self, trainer: pl.Trainer, task: pl.LightningModule) -> None:
        """Before evaluations during training."""
        self._show()

    def evaluated(self, trainer: pl.Trainer, task: pl.LightningModule, *args: Any, **kwargs: Any) -> None:
        """After them."""
        self._restore()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._show()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        state = checkpoint["state_dict"]
        trained = {name: state[name] for name in self.average} if self._trained is None else dict(self._trained)
        checkpoint["ema"] = trained
        checkpoint["state_dict"] = {**state, **self.average}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        trained = checkpoint.get("ema")
        if trained is None:  # of a run without: the average starts here
            return
        self.average = {name: checkpoint["state_dict"][name] for name in trained}
        pl_module.load_state_dict({**checkpoint["state_dict"], **trained})

    def state_dict(self) -> dict[str, Any]:
        return {"decay": self.decay}  # so that Lightning warns of a run that is resumed without this callback

    def _show(self) -> None:
        if self._trained is None:
            self._trained = {name: value.detach().clone() for name, value in self._weights.items()}
            _copy(self.average, self._weights)

    def _restore(self) -> None:
        if self._trained is not None:
            _copy(self._trained, self._weights)
            self._trained = None


def _averaged(task: pl.LightningModule) -> dict[str, Tensor]:
    saved = task.state_dict().keys()
    found: dict[str, Tensor] = {name: p for name, p in task.named_parameters() if p.requires_grad}
    buffers = ((name, b) for name, b in task.named_buffers() if name in saved and b.is_floating_point())
    return found | dict(buffers)


@torch.no_grad()
def _copy(values: dict[str, Tensor], into: dict[str, Tensor]) -> None:
    for name, value in values.items():
        into[name].copy_(value)
