"""The contract between data, models, losses, tasks and evaluations: batch keys, `ClipOutput`, `Preprocess`.

Everything else in the house may import this file; this file imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol, TypedDict, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

CLOSED, OPEN = "closed: ", "open: "  # how the name of an answer begins that belongs to closed, or to open, questions


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, where, and the remedy.

    Verbs print it without a traceback and exit with status 2.
    """


@dataclass(frozen=True)
class Preprocess:
    """How a model wants its images: the part of open_clip's `preprocess_cfg` that changes pixels.

    `size` is (height, width). `mean` and `std` are per RGB channel on a 0..1 scale.
    """

    size: tuple[int, int] = (224, 224)
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    fill_color: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain lists and strings, safe for JSON and for `torch.load(weights_only=True)`."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Preprocess:
        """Inverse of `as_dict`; also takes open_clip's form: `size` may be one integer, keys may be missing."""
        known = {k: fields[k] for k in cls.__dataclass_fields__ if fields.get(k) is not None}
        size = known.get("size", cls.size)
        known["size"] = (size, size) if isinstance(size, int) else tuple(size)
        for name in ("mean", "std"):
            if name in known:
                known[name] = tuple(float(v) for v in known[name])
        return replace(cls(), **known)


class Batch(TypedDict, total=False):
    """One step's input. Methods add keys; nobody relies on positions.

    A training batch always has the full number of rows, whatever was skipped: rows from `len(batch["key"])` on are
    padding, which the task drops after the towers (shapes stay static, and DDP ranks never disagree). It repeats the
    real rows, so that batch norms see the statistics of real samples; without a real row it is zeros.
    """

    image: Tensor  # uint8 (b, 3, h, w) as decoded, normalised by the model on its device; or float, already normalised
    text: Tensor  # int64 (b, context_length) token ids; absent where the model has no tokenizer
    label: Tensor  # float32 (b, c): 1 present, 0 absent, NaN not known (to be ignored)
    mean: Tensor  # float32 (b, 3): statistics of each row's own data set, on a 0..1 scale, in place of the model's
    std: Tensor  # float32 (b, 3)
    bag: Tensor  # float (b, n, d) features of a slide's patches, padded with zeros
    real: Tensor  # bool (b, n): False where a bag is padded
    coords: Tensor  # int64 (b, n, 2) level-0 coordinates (x, y) of the patches
    time: Tensor  # float32 (b,) until the event or, without one, until the last that is known
    event: Tensor  # float32 (b,): 1 where the event was seen, 0 where the time is censored
    key: list[str]  # n <= b keys of the real rows
    meta: list[dict[str, Any]]  # metadata of the real rows, where a consumer asked for it
    skipped: int  # samples that this batch should have had, but that could not be used
    epoch: int  # epoch this batch belongs to
    position: int  # samples of the epoch consumed by all ranks once this batch is done


class ClipOutput(NamedTuple):
    """What a CLIP-like model returns; unit-norm features, and the scalars as they enter the logits."""

    image_features: Float[Tensor, "n d"]
    text_features: Float[Tensor, "m d"]
    logit_scale: Float[Tensor, ""]  # already exponentiated
    logit_bias: Float[Tensor, ""] | None = None


@runtime_checkable
class Tokenizer(Protocol):
    """Texts to token ids, padded or cut to `context_length`."""

    context_length: int

    def __call__(self, texts: str | Sequence[str]) -> Tensor: ...  # int64 (n, context_length)


@runtime_checkable
class DualEncoder(Protocol):
    """A CLIP as evaluations see it: two towers, and what to feed them with."""

    preprocess: Preprocess
    tokenizer: Tokenizer

    def encode_image(self, image: Tensor) -> Tensor: ...  # (b, 3, h, w) uint8 or float -> unit-norm (b, d)

    def encode_text(self, text: Tensor) -> Tensor: ...  # (b, context_length) -> unit-norm (b, d)

    @property
    def device(self) -> torch.device: ...


class Asked(NamedTuple):
    """Questions as their encoder hands them to a head."""

    states: Float[Tensor, "b q dim"]  # after each word
    real: Bool[Tensor, "b q"]  # False where there is padding
    embedded: Float[Tensor, "b q width"]  # each word by itself


@runtime_checkable
class QuestionEncoder(Protocol):
    """Token ids of questions to `Asked`."""

    dim: int
    width: int

    @property
    def tokenizer(self) -> Tokenizer: ...

    def __call__(self, text: Int64[Tensor, "b q"]) -> Asked: ...

    def another(self) -> QuestionEncoder: ...  # of the same words, with weights of its own


class Sample(TypedDict, total=False):
    """One decoded item of an evaluation set."""

    image: np.ndarray  # uint8 (h, w, 3)
    captions: list[str]
    meta: dict[str, Any]
    key: str
