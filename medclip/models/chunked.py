"""Contrastive steps in chunks: the loss sees the whole batch, memory holds the activations of one chunk.

Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", arXiv:2101.06983 (cached
gradients). With f the features of all rows, the gradient of a tower's parameters is a sum over its chunks,

    dL/dw = sum_c (df_c/dw)^T dL/df_c,

so that a first pass without graph yields f, the loss on f yields dL/df, and a second pass over the chunks, one after
the other, adds up the rest. Here the second pass is the backward of one autograd function: tasks, losses, gathering
over ranks and DDP see an ordinary model, whose parameters get their gradient once a step. The last chunk keeps its
graph from the first pass, which costs no memory beyond a chunk's and saves its second pass.

Random draws (dropout, drop path, patch dropout) and autocast are replayed, so that a chunk is the same both times.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import get_device_states, set_device_states

from medclip.models.clip import Clip, Encode
from medclip.types import UserError

_log = logging.getLogger(__name__)


def chunked(model: Clip, rows: int) -> Clip:
    """Have `model` encode at most `rows` rows of a batch at a time, in training and validation.

    Gradients are those of the whole batch. Batch norms are the exception: they normalise by the statistics of a chunk,
    and count each chunk once in their running ones.

    Raises:
        UserError: the model is no CLIP, or `rows` no positive number.
    """
    if not isinstance(model, Clip):
        raise UserError("adapt=[chunked] is for contrastive training of a CLIP: leave it out here")
    if not isinstance(rows, int) or rows < 1:
        raise UserError(f"adapt.chunked.rows is {rows}: give the rows of a chunk, 1 or more")
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        _log.warning(
            "adapt=[chunked]: the model has batch norms, which see the statistics of %d rows, not of the batch", rows
        )
    model.through = Chunks(model, rows)
    return model


class Chunks:
    """Encodes rows chunk by chunk; chunks are as equal as they can be, none has more than `rows` rows."""

    def __init__(self, model: Clip, rows: int) -> None:
        self.model = model
        self.rows = rows

    def __call__(self, encode: Encode, rows: Tensor) -> Float[Tensor, "b d"]:
        count = -(-len(rows) // self.rows)
        if count <= 1:
            return encode(rows)
        if isinstance(self.model, FSDPModule):
            raise UserError(
                "adapt=[chunked] does not work with trainer=fsdp: choose trainer=ddp, or leave chunked out and save "
                "activations with adapt=[checkpointing]"
            )
        trained = self._trained(encode)
        if not trained or not torch.is_grad_enabled():
            with torch.no_grad():  # a frozen tower needs no second pass
                return torch.cat([encode(chunk) for chunk in rows.tensor_split(count)])
        features = _TwoPasses.apply(_Tower(self.model, encode, trained), count, rows, *trained)
        assert isinstance(features, Tensor)
        return features

    def _trained(self, encode: Encode) -> list[nn.Parameter]:
        """The trainable parameters that `encode` may use: all but those of the other tower and of the logits."""
        net = self.model.net
        visual = set(net.visual.parameters())
        others = set(net.parameters()) - visual
        if encode != self.model.encode_image:
            others = visual | {p for p in (net.logit_scale, net.logit_bias) if p is not None}
        return [p for p in self.model.parameters() if p.requires_grad and p not in others]


class _Tower:
    """One tower in one step: how it was run in the first pass, and what gathers the gradients of the second.

    Gradients go to stand-ins of the parameters, which share their values: the parameters' own `.grad`, and DDP's hooks
    on them, are left to the outer backward pass.
    """

    def __init__(self, model: Clip, encode: Encode, trained: Sequence[nn.Parameter]) -> None:
        self.encode = encode
        self.stand_ins = {p: nn.Parameter(p.detach()) for p in trained}
        self.homes = [
            (module._parameters, name, p)
            for module in model.modules()
            for name, p in module._parameters.items()
            if p is not None and p in self.stand_ins
        ]
        self.norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        kind = model.device.type
        dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        # Without its cache: that holds casts of the weights made without graph, which a later use would get no gradient
        # through.
        self.autocast: Callable[[], Any] = lambda: torch.autocast(kind, dtype, enabled, cache_enabled=False)

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Within it, the model's modules hold the stand-ins."""
        try:
            for home, name, p in self.homes:
                home[name] = self.stand_ins[p]
            yield
        finally:
            for home, name, p in self.homes:
                home[name] = p

    @contextmanager
    def again(self, draws: _Draws) -> Iterator[None]:
        """Within it, a chunk is encoded as it was before; batch norms, which have counted it, do not count it again."""
        with ExitStack() as stack:
            stack.enter_context(draws.replayed())
            for norm in self.norms:
                norm.track_running_stats = False
                stack.callback(setattr, norm, "track_running_stats", True)
            stack.enter_context(self.autocast())
            yield

    def take_gradients(self) -> list[Tensor | None]:
        """Of each parameter; given away, so that the outer pass need not copy them."""
        found = [stand_in.grad for stand_in in self.stand_ins.values()]
        for stand_in in self.stand_ins.values():
            stand_in.grad = None
        return found


class _Draws:
    """Where the generators of the CPU and of the rows' device stand now."""

    def __init__(self, rows: Tensor) -> None:
        self.cpu = torch.get_rng_state()
        self.devices, self.states = get_device_states(rows)
        self.kind = rows.device.type if self.devices else "cuda"  # of no device, `fork_rng` takes any kind

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Within it, they draw again what they drew from here on; after it, they stand where they stood before."""
        with torch.random.fork_rng(self.devices, device_type=self.kind):
            torch.set_rng_state(self.cpu)
            set_device_states(self.devices, self.states, device_type=self.kind)
            yield


class _TwoPasses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tower: _Tower, count: int, rows: Tensor, *trained: nn.Parameter) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.tower = tower
        ctx.save_for_backward(rows)
        *early, last = rows.tensor_split(count)
        ctx.draws, features = [], []
        with tower.standing_in(), tower.autocast():
            for chunk in early:
                ctx.draws.append(_Draws(chunk))
                features.append(tower.encode(chunk))
            with torch.enable_grad():
                ctx.kept = tower.encode(last)
        return torch.cat([*features, ctx.kept.detach()])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        tower: _Tower = ctx.tower
        (rows,), (grad,) = ctx.saved_tensors, grads
        kept, ctx.kept = ctx.kept, None
        if grad is None or not kept.requires_grad:
            return None, None, None, *(None for _ in tower.stand_ins)
        count = len(ctx.draws) + 1
        *early, last = grad.tensor_split(count)
        with tower.standing_in():
            kept.backward(last)
            del kept
            for chunk, part, draws in zip(rows.tensor_split(count), early, ctx.draws, strict=False):
                with torch.enable_grad(), tower.again(draws):
                    features = tower.encode(chunk)
                features.backward(part)
        return None, None, None, *tower.take_gradients()
