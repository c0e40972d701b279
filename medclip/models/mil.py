"""A model of slides: a head on the bag of a slide's features (multiple-instance learning), and what its outputs mean.

Targets, with z the head's outputs:

    classes     softmax(z), one of c classes
    multilabel  sigmoid(z), each of c findings by itself
    ordinal     c - 1 outputs z_j = logit P(y > j | y > j - 1), so P(y > j) = prod_{i <= j} sigmoid(z_i), which cannot
                rise with j (the chain rule of CORN: Shi, Cao, Raschka 2021, arXiv:2111.08851); the losses see its logit
    survival    hazards sigmoid(z_t) = P(event in bin t | none before) of time bins (Zadeh and Schmid 2020, TPAMI,
                arXiv:2006.13818); with one bin or none named, one log risk (Cox 1972)

The risk of hazards is -sum_t S(t), S(t) = prod_{s <= t} (1 - sigmoid(z_s)): the expected time, turned round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from medclip.models.encoder import refuse_unlike
from medclip.models.parts import describe, find
from medclip.models.weights import read_checkpoint
from medclip.types import Batch, UserError

Target = Literal["classes", "ordinal", "multilabel", "survival"]


class MilOut(NamedTuple):
    """What the losses and the task get, a row a bag.

    `logits` are (b, c), cumulative (b, c - 1) for ordinal targets (P(y > j)), of hazards (b, bins) or a log risk (b, 1)
    for survival. `extra` has a column for each of the model's `extra_names`: losses of the head's own.
    """

    logits: Float[Tensor, "b outputs"]
    extra: Float[Tensor, "b m"]
    attention: Float[Tensor, "b k n"]


class MilPrediction(NamedTuple):
    """What evaluations get: probabilities (b, c), for survival the risk (b,), the higher the sooner."""

    scores: Tensor
    attention: Float[Tensor, "b k n"]
    slide: Float[Tensor, "b e"]


class MilModel(nn.Module):
    """`Batch` -> `MilOut`.

    Args:
        head: a head without its sizes, see medclip/heads/pooled.py.
        dim: numbers a patch's features have.
        classes: names of the classes, of the findings, of the grades from the lowest, of the time bins from the first;
            one or none for a Cox risk.
        target: what the outputs mean.
        encoder: name of the model that made the features; None: not known, and not checked.

    Raises:
        UserError: an unknown target, or too few or repeated classes.
    """

    tokenizer = None
    preprocess = None

    def __init__(
        self,
        head: partial[Any],
        dim: int,
        classes: Sequence[str] = (),
        target: Target = "classes",
        encoder: str | None = None,
    ) -> None:
        super().__init__()
        self.classes = list(map(str, classes))
        self.outputs = outputs_of(target, self.classes)
        self.target: Target = target
        self.dim = dim
        self.encoder = encoder
        self._made_by = head
        self.head: Any = head(dim=dim, outputs=self.outputs)
        self.extra_names: tuple[str, ...] = tuple(self.head.extra_names)
        self.register_buffer("_here", torch.zeros(()), persistent=False)
        self._here: Tensor

    @property
    def device(self) -> torch.device:
        return self._here.device

    @property
    def description(self) -> dict[str, Any]:
        """Plain data from which `mil_from` makes this model again, without its weights."""
        return {
            "kind": "mil",
            "head": describe(self._made_by),
            "dim": self.dim,
            "classes": self.classes,
            "target": self.target,
            "encoder": self.encoder,
        }

    def forward(self, batch: Batch) -> MilOut:
        """Logits of `batch["bag"]`; the head's own losses where `batch["label"]` is known.

        Raises:
            UserError: no bags, features of another width, or labels of another number.
        """
        bag, real, label = batch.get("bag"), batch.get("real"), batch.get("label")
        if bag is None or real is None:
            raise UserError("the data hand out no bags of features: say data=bags")
        self.refuse(bag.shape[2], None)
        if self.target == "survival":
            label = None  # the time bin of a censored slide is no label that a head could learn from
        if label is not None and label.shape[1] != self.outputs:
            raise UserError(
                f"the data have {label.shape[1]} labels a bag, the model {self.outputs} outputs: model.classes must be "
                "${data.labels.names}, model.target ${data.target}"
            )
        pooled = self.head(bag, real, label)
        return MilOut(self._meant(pooled.logits), pooled.extra, pooled.attention)

    def predict(self, bag: Float[Tensor, "b n dim"], real: Bool[Tensor, "b n"] | None = None) -> MilPrediction:
        """Probabilities or risk of bags; `real` is False where a bag is padded (None: nowhere).

        Raises:
            UserError: features of another width.
        """
        self.refuse(bag.shape[2], None)
        real = torch.ones(bag.shape[:2], dtype=torch.bool, device=bag.device) if real is None else real
        pooled = self.head(bag, real, None)
        return MilPrediction(probabilities(self._meant(pooled.logits), self.target), pooled.attention, pooled.slide)

    def refuse(self, width: int, encoder: str | None, where: str = "the features") -> None:
        """Refuse features that this model was not trained on.

        Args:
            width: numbers a patch has.
            encoder: the model that made them; None: not known.
            where: what is refused, in words.

        Raises:
            UserError: another width, or another encoder.
        """
        if width != self.dim:
            raise UserError(
                f"{where} have {width} numbers a patch, the slide model {self.dim}: extract the features with the "
                f"encoder that it was trained on ({self.encoder or 'its run folder says which'})"
            )
        if encoder is not None and self.encoder is not None and encoder != self.encoder:
            raise UserError(
                f"{where} were made by encoder {encoder!r}, but the slide model was trained on {self.encoder!r}: "
                "extract the features with that one"
            )

    def _meant(self, logits: Float[Tensor, "b outputs"]) -> Float[Tensor, "b outputs"]:
        return cumulative(logits) if self.target == "ordinal" else logits


def outputs_of(target: str, classes: Sequence[str]) -> int:
    """How many logits a target has.

    Raises:
        UserError: an unknown target, or too few or repeated classes.
    """
    if target not in get_args(Target):
        raise UserError(f"model.target={target} is unknown: one of {', '.join(get_args(Target))}")
    if len(set(classes)) < len(classes):
        raise UserError(f"model.classes names one twice ({', '.join(classes)}): give each class a name of its own")
    least = {"classes": 2, "ordinal": 2, "multilabel": 1, "survival": 0}[target]
    if len(classes) < least:
        raise UserError(
            f"model.target={target} needs at least {least} classes, but model.classes has {len(classes)}: name them "
            "in the data (see conf/data/bags.yaml)"
        )
    return len(classes) - 1 if target == "ordinal" else max(1, len(classes))


def cumulative(logits: Float[Tensor, "b steps"]) -> Float[Tensor, "b steps"]:
    """logit P(y > j) of the logits of P(y > j | y > j - 1); the same for the first."""
    log_p = F.logsigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32))).cumsum(1)
    # The first is what it was, to the bit; of the others log(1 - p) in the form that is exact for each p.
    log_p = log_p[:, 1:].clamp(max=-torch.finfo(log_p.dtype).tiny)
    sure = log_p > -0.6931
    near, far = log_p.where(sure, -0.5), log_p.where(~sure, -1.0)
    log_not = torch.where(sure, (-torch.expm1(near)).log(), torch.log1p(-far.exp()))
    return torch.cat([logits[:, :1].to(log_p.dtype), log_p - log_not], 1)


def probabilities(logits: Float[Tensor, "b outputs"], target: Target) -> Tensor:
    """Of the classes (b, c), or the risk (b,), from `MilOut.logits`."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if target == "classes":
        return logits.softmax(1)
    if target == "multilabel":
        return logits.sigmoid()
    if target == "ordinal":
        above = F.pad(F.pad(logits.sigmoid(), (1, 0), value=1.0), (0, 1))
        return above[:, :-1] - above[:, 1:]
    if logits.shape[1] == 1:
        return logits[:, 0]
    return -F.logsigmoid(-logits).cumsum(1).exp().sum(1)


def build_mil(
    head: partial[Any],
    dim: int,
    classes: Sequence[str] | None = None,
    target: Target = "classes",
    encoder: str | None = None,
    init: str | None = None,
) -> MilModel:
    """A model to be trained.

    Args:
        head: see `MilModel`, as are the others.
        dim: of the features.
        classes: their names.
        target: what the outputs mean.
        encoder: of the features.
        init: start from the weights of this checkpoint, of a model of the same shape.

    Raises:
        UserError: see `MilModel`; a checkpoint that does not fit.
    """
    model = MilModel(head, dim, classes or (), target, encoder)
    if init is not None:
        content = read_checkpoint(Path(init).expanduser())
        about, state = content.get("medclip"), content.get("state_dict")
        if not isinstance(about, Mapping) or about.get("kind") != "mil" or not isinstance(state, Mapping):
            raise UserError(f"model.init={init} is no slide model: give a checkpoint of medclip train experiment=mil_…")
        made_by = about.get("encoder")
        theirs, ours = (about.get("dim"), made_by or encoder), (dim, encoder or made_by)
        if theirs != ours:
            raise UserError(
                f"model.init={init} was trained on features of {theirs[0]} numbers by {theirs[1]}, these are of "
                f"{ours[0]} by {ours[1]}: give a checkpoint of the same encoder, or leave model.init out"
            )
        taken = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
        refuse_unlike(model.state_dict(), taken, init)
        model.load_state_dict(taken)
    return model


def mil_from(description: Mapping[str, Any]) -> MilModel:
    """The described model (`MilModel.description`) with random weights."""
    return MilModel(
        find(description["head"]),
        description["dim"],
        description["classes"],
        description["target"],
        description["encoder"],
    )
