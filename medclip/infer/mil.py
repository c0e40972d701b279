"""What a model of slides says of a bag: probabilities or a risk, where it looked, and the slide as one vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from medclip.types import UserError


class Prediction(Protocol):
    """Of bags, as the model gives it: `scores` are probabilities (b, c), for survival the risk (b,)."""

    @property
    def scores(self) -> Tensor: ...

    @property
    def attention(self) -> Float[Tensor, "b k n"]: ...

    @property
    def slide(self) -> Float[Tensor, "b e"]: ...


@runtime_checkable
class BagModel(Protocol):
    """A model of slides."""

    classes: Sequence[str]
    target: str  # classes | ordinal | multilabel | survival

    @property
    def description(self) -> Mapping[str, Any]: ...

    @property
    def device(self) -> torch.device: ...

    def predict(self, bag: Tensor, real: Tensor | None = None) -> Prediction: ...

    def refuse(self, width: int, encoder: str | None, where: str = "the features") -> None: ...


class Reading(NamedTuple):
    """Of one slide: probability of each class, or the risk alone; attention over its patches; its vector."""

    scores: Float[np.ndarray, " c"]
    attention: Float[np.ndarray, "k n"]
    slide: Float[np.ndarray, " e"]


@torch.inference_mode()
def read_bag(model: BagModel, bag: Float[Tensor, "n d"], real: Bool[Tensor, " n"] | None = None) -> Reading:
    """The model's reading of one slide's patches.

    Raises:
        UserError: it answers NaN, or the features have another width.
    """
    rows = bag if real is None else bag[real]
    found = model.predict(rows[None].to(model.device))
    scores = np.atleast_1d(found.scores[0].double().cpu().numpy())
    if np.isnan(scores).any():
        raise UserError("the slide model answers NaN: its training diverged, its weights or the features are broken")
    return Reading(scores, found.attention[0].double().cpu().numpy(), found.slide[0].float().cpu().numpy())


def looked_at(reading: Reading, target: str) -> Float[np.ndarray, " n"]:
    """Where it looked, as one map: of an attention for each class that of the likeliest class, else the mean of all."""
    attention = reading.attention
    by_class = target in ("classes", "multilabel") and len(attention) == len(reading.scores) > 1
    return attention[int(reading.scores.argmax())] if by_class else attention.mean(axis=0)
