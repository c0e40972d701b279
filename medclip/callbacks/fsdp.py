"""FSDP2: each rank holds its part of every weight, gradient and moment, and gathers a block's weights when it runs.

Zhao et al. 2023, "PyTorch FSDP", arXiv:2304.11277, in its second form (`torch.distributed.fsdp.fully_shard`), which
keeps the names and the shapes of parameters. A run is DDP's but for the order of a few sums, and so are its files:
checkpoints are whole, in one file, and go on under DDP, in one process or on another number of ranks.

Lightning's ModelParallelStrategy starts the processes. Its way with checkpoints is not taken: it numbers the
optimiser's state by the model's parameters, not by the optimiser's groups as plain torch does, and loads weights before
a checkpoint of another model can be refused.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lightning_fabric.utilities.optimizer import _optimizers_to_device
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.strategies import ModelParallelStrategy
from pytorch_lightning.strategies.strategy import Strategy
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _NormBase

from medclip.types import DualEncoder, UserError

ENTRIES = ("encode_image", "encode_text")  # what evaluations call instead of the model itself


class FullyShard(ModelParallelStrategy):
    """Shards the task's `model`, a CLIP, over all ranks: its blocks (see `blocks`), and the rest as one more.

    Masked autoencoders are refused: they run their blocks piece by piece, where nothing would gather the weights.

    Scalars, such as the logit scale, cannot be sharded: every rank holds them, and their gradients are averaged here.

    Raises:
        UserError: torch is too old; the model is no CLIP; a loss term has weights of its own.
    """

    def __init__(self) -> None:
        if "ignored_params" not in inspect.signature(fully_shard).parameters:
            raise UserError("trainer=fsdp needs a newer torch (2.7 or later): choose trainer=ddp, or upgrade torch")
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)
        self._whole: list[nn.Parameter] = []

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False  # weights are loaded while they are whole

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        assert self.model is not None and self.accelerator is not None
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        self._shard()
        self.barrier()
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if fitting:
            _optimizers_to_device(self.optimizers, self.root_device)

    def _shard(self) -> None:
        assert self.lightning_module is not None
        model = self.lightning_module.model
        if not (isinstance(model, nn.Module) and isinstance(model, DualEncoder)):
            raise UserError("trainer=fsdp is for contrastive training of a CLIP: choose trainer=ddp here")
        inside = set(model.parameters())
        if any(p.requires_grad and p not in inside for p in self.lightning_module.parameters()):
            raise UserError("trainer=fsdp shards the model only, but a loss term has weights too: choose trainer=ddp")
        for value in (*model.parameters(), *model.buffers()):
            dist.broadcast(value.detach(), 0)  # as DDP does, whatever each rank drew
        warnings.filterwarnings("ignore", ".*returned a view tensor.*")  # the logits' scalars, which nobody writes to
        shard(model, self.device_mesh["data_parallel"])
        self._whole = [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]

    def post_backward(self, closure_loss: Tensor) -> None:
        for p in self._whole:
            if p.grad is not None:
                dist.all_reduce(p.grad)
                p.grad /= self.world_size

    def on_validation_start(self) -> None:
        """Validation sees rank 0's statistics of batch norms on all ranks, as under DDP, and as a resumed run does."""
        assert self.lightning_module is not None
        norms = (module for module in self.lightning_module.modules() if isinstance(module, _NormBase))
        for norm in norms:
            for buffer in norm.buffers(recurse=False):
                dist.broadcast(buffer, 0)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self._on_rank_zero(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        plain: Any = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state = plain.state_dict()
        return {**state, "state": {i: self._on_rank_zero(values) for i, values in state["state"].items()}}

    def _on_rank_zero(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """All values whole and on the CPU; nothing on other ranks, which do take part."""
        found = {}
        for name, value in values.items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if self.is_global_zero:
                found[name] = whole.cpu() if isinstance(whole, Tensor) else whole
        return found

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {i: _like(parameters[i], values) for i, values in saved["state"].items()}
            optimizer.load_state_dict({**saved, "state": state})
        _optimizers_to_device(self.optimizers, self.root_device)


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Have each rank of a mesh of one dimension hold its part of `model`, in place.

    Its methods `ENTRIES` gather the weights as a call of the model does.
    """
    scalars = {p for p in model.parameters() if p.ndim == 0}
    for block in blocks(model):
        fully_shard(block, mesh=mesh, ignored_params=scalars)
    fully_shard(model, mesh=mesh, ignored_params=scalars)
    for name in ENTRIES:
        register_fsdp_forward_method(model, name)
        setattr(model, name, _not_in_inference_mode(getattr(model, name)))


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Members of the outermost lists of two and more modules of one class: a ViT's or a BERT's layers, stages."""
    for child in module.children():
        members = list(child.children()) if isinstance(child, nn.ModuleList | nn.Sequential) else []
        if len(members) > 1 and len({type(member) for member in members}) == 1:
            yield from (member for member in members if any(True for _ in member.parameters()))
        else:
            yield from blocks(child)


def _not_in_inference_mode(encode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Weights gathered in inference mode would be of no use to the training step that comes next."""

    @functools.wraps(encode)
    def encoded(rows: Tensor) -> Tensor:
        if not torch.is_inference_mode_enabled():
            return encode(rows)
        with torch.inference_mode(False), torch.no_grad():
            return encode(rows)

    return encoded


def _like(parameter: nn.Parameter, values: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's moments, sharded as it is."""
    if not isinstance(parameter, DTensor):
        return dict(values)
    mesh, placements = parameter.device_mesh, parameter.placements
    return {
        name: distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)
        if isinstance(value, Tensor) and value.shape == parameter.shape
        else value
        for name, value in values.items()
    }
