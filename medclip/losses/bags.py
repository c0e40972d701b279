"""What losses of slides share: the logits of a bag and what is known of it, in float32 at least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from medclip.types import Batch, UserError


@runtime_checkable
class Bagged(Protocol):
    """What a model of bags returns, as far as these losses go."""

    @property
    def logits(self) -> Float[Tensor, "b outputs"]: ...


def logits_of(out: Bagged) -> Float[Tensor, "b outputs"]:
    """In float32 or better: what autocast made half as exact is not added up so."""
    return out.logits.to(torch.promote_types(out.logits.dtype, torch.float32))


def labels_of(batch: Batch, logits: Float[Tensor, "b c"]) -> Float[Tensor, "b c"]:
    """`batch["label"]` in the logits' precision.

    Raises:
        UserError: there is none, or it has another width than the logits.
    """
    label = batch.get("label")
    if label is None:
        raise UserError("the bags have no labels: say data.target and data.names (see conf/data/bags.yaml)")
    if label.shape != logits.shape:
        raise UserError(
            f"the bags have {label.shape[1]} labels each, the model {logits.shape[1]} outputs: data.target and "
            "model.target must be the same, and the loss the one of that target"
        )
    return label.to(logits.dtype)


def followed(batch: Batch) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """`batch["time"]` and `batch["event"]`.

    Raises:
        UserError: there is none.
    """
    time, event = batch.get("time"), batch.get("event")
    if time is None or event is None:
        raise UserError("the bags have no times of events: say data.target=survival, and the columns time and event")
    return time.float(), event.float()


def numbers(name: str, key: str, given: Sequence[float | int] | str | None) -> Tensor | None:
    """A weight a class from a config; None for none, and for "balanced", which the data decide.

    Raises:
        UserError: another word, or a number that is not above 0.
    """
    if given is None or given == "balanced":
        return None
    if isinstance(given, str) or not all(isinstance(v, int | float) and v > 0 for v in given):
        raise UserError(f"loss {name}: {key} is {given!r}: give a number above 0 a class, balanced, or null")
    return torch.tensor(list(given)).float()
