"""One training step without content: what it holds, and how many operations it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from medclip.dry.memory import LiveBytes, without_content
from medclip.types import Batch, ClipOutput


@dataclass(frozen=True)
class Step:
    """Of one rank, forwards and backwards; FLOPs are two for each multiply-add.

    Args:
        kept: bytes alive between the forward and the backward pass.
        peak: the most bytes alive at once, without weights, batch and gradients of the weights.
        flops: of matrix products and convolutions, what is computed twice included.
    """

    kept: float
    peak: float
    flops: float


def make_batch(model: Any, rows: int, classes: int) -> Batch:
    """A batch of `rows` rows as `model` eats it: images, and texts or labels where it has them."""
    batch: Batch = {
        "image": torch.zeros((rows, 3, *model.preprocess.size), dtype=torch.uint8),
        "key": [str(i) for i in range(rows)],
    }
    if model.tokenizer is not None:
        batch["text"] = torch.zeros((rows, model.tokenizer.context_length), dtype=torch.long)
    if classes:
        batch["label"] = torch.zeros(rows, classes)
    return batch


def dry_step(task: Any, rows: int, *, contrasted: int, classes: int = 0, autocast: torch.dtype | None = None) -> Step:
    """Measure a step of `task`, whose modules lie on the meta device and are given fake tensors here.

    Args:
        task: `.model`, `.weigh(out, batch)`.
        rows: of the batch, on each rank.
        contrasted: rows whose features a contrastive loss sees: those of all ranks.
        classes: columns of the labels, 0 where there are none.
        autocast: type of the products; None: as the weights are.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        without_content(task)
        task.train()
        batch = make_batch(task.model, rows, classes)
        kept, peak = _memory(task, batch, contrasted, autocast)
        counter = _counter()
        # Apart from the memory: under torch's counter, recomputed activations are held longer than they are needed.
        with counter:
            _backward(_forward(task, batch, contrasted, autocast))
    return Step(kept, peak, counter.get_total_flops())


def _memory(task: Any, batch: Batch, contrasted: int, autocast: torch.dtype | None) -> tuple[int, int]:
    """Bytes between the passes, and the most of both; gradients of the weights are not counted."""
    live = LiveBytes()
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda p: live.forget(p.grad))
        for parameter in task.parameters()
        if parameter.requires_grad
    ]
    with live:
        total = _forward(task, batch, contrasted, autocast)
        kept = live.now()
        _backward(total)
    for hook in hooks:
        hook.remove()
    return kept, live.peak


def _forward(task: Any, batch: Batch, contrasted: int, autocast: torch.dtype | None) -> Tensor:
    with torch.autocast("cpu", autocast, autocast is not None):
        return task.weigh(_of_all(task.model(batch), contrasted), batch)[1]


def _backward(total: Tensor) -> None:
    if total.requires_grad:
        total.backward()


def forward_flops(encode: Callable[[Tensor], Any], module: nn.Module, rows: Callable[[], Tensor]) -> float:
    """FLOPs of `encode` on what `rows` makes; `module` (all that it uses) is given fake tensors and eval mode.

    torch's own layers must not take their fused path in it, which is not counted.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        without_content(module)
        module.eval()
        with _counter() as counter:
            encode(rows())
    return counter.get_total_flops()


def _of_all(out: Any, contrasted: int) -> Any:
    """What the loss sees: a CLIP's features of all ranks, else a rank's own rows."""
    if not isinstance(out, ClipOutput) or len(out.image_features) == contrasted:
        return out
    times = -(-contrasted // len(out.image_features))
    image, text = (x.repeat(times, 1)[:contrasted] for x in (out.image_features, out.text_features))
    return out._replace(image_features=image, text_features=text)


def _counter() -> FlopCounterMode:
    """torch's counter, which does not know attention's fused path on CPUs."""

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: forward,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        },
    )
