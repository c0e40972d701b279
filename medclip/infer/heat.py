"""Values of a slide's patches for a heat map: from a text, from a slide model's attention, from its class probability.

Each is called with the features of one slide (n, d) and gives (n,) numbers; `slides.heat_slide.Source` says what a map
needs beside them. Attention says what the model pooled, not why it decided; the class probability of a patch is the
model's for a slide that consists of this patch alone, so it needs no gradient and no head of a special kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from medclip.infer.zeroshot import embed_texts, own_logit_scale
from medclip.infer.zeroshot_slide import patch_scores
from medclip.types import DualEncoder, UserError

_BAGS = 1024  # patches that are looked at alone at a time


class Encoder(Protocol):
    """A CLIP's image tower as features were extracted with it."""

    name: str
    model: Any

    @property
    def fingerprint(self) -> str: ...  # of its weights


class Predicted(NamedTuple):
    """As a slide model predicts."""

    scores: Tensor  # (b, c) probabilities, (b,) risks
    attention: Float[Tensor, "b k n"]
    slide: Float[Tensor, "b e"]


class SlideModel(Protocol):
    """A head on bags of features, see medclip/models/mil.py."""

    classes: list[str]
    target: str

    @property
    def device(self) -> torch.device: ...

    def eval(self) -> Any: ...

    def predict(self, bag: Tensor, real: Tensor | None = None) -> Any: ...  # `Predicted`

    def refuse(self, width: int, encoder: str | None, where: str = "") -> None: ...


class TextHeat:
    """How much each patch is like a text.

    Args:
        encoder: of the checkpoint that made the features.
        prompts: sentences for what is looked for; their mean (of unit norm) is compared.
        negative: sentences for what else there may be, each a class of its own.
        score: softmax is the probability of the prompts among the negatives, at the model's own temperature;
            similarity is the cosine, less that of the nearest negative where there are some.

    Raises:
        UserError: no prompt, softmax without negatives, or a checkpoint without texts.
    """

    def __init__(
        self,
        encoder: Encoder,
        prompts: Sequence[str] | str,
        negative: Sequence[str] | str = (),
        score: Literal["softmax", "similarity"] = "similarity",
    ) -> None:
        wanted, others = _sentences(prompts), _sentences(negative)
        if not wanted:
            raise UserError("source.prompts is empty: say what to look for, e.g. 'source.prompts=[\"tumor cells\"]'")
        if score not in ("softmax", "similarity"):
            raise UserError(f"source.score={score} is unknown: softmax or similarity")
        if score == "softmax" and not others:
            raise UserError(
                "source.score=softmax needs something to compare with: give source.negative, or score=similarity"
            )
        self.encoder, self.score = encoder, score
        clip: DualEncoder = encoder.model
        if not hasattr(clip, "encode_text"):
            raise UserError(f"encoder {encoder.name} has no text tower: give the checkpoint of a CLIP")
        features = embed_texts(clip, [*wanted, *others])
        mean = torch.nn.functional.normalize(features[: len(wanted)].mean(0, keepdim=True), dim=-1)
        self.texts = torch.cat([mean, features[len(wanted) :]])
        self.temperature = own_logit_scale(clip)
        self.signed = score == "similarity" and bool(others)
        self.name = wanted[0] if len(wanted) == 1 else f"{wanted[0]} (+{len(wanted) - 1})"
        against = f" against {_quoted(others)}" if others else ""
        words = {"softmax": "probability of", "similarity": "similarity to"}[score]
        self.label = f"{words} {_quoted(wanted)}{against}"

    def __call__(self, features: np.ndarray, about: Mapping[str, Any], where: str) -> np.ndarray:
        """(n,) values.

        Raises:
            UserError: the features are not of this checkpoint.
        """
        refuse_others(about, self.encoder.name, self.encoder.fingerprint, where)
        if features.shape[1] != self.texts.shape[1]:
            raise UserError(
                f"{where}: features of {features.shape[1]} numbers, the checkpoint's texts have "
                f"{self.texts.shape[1]}: extract them with encoder=clip and this checkpoint"
            )
        scores = patch_scores(torch.from_numpy(features), self.texts)
        if self.score == "softmax":
            return torch.from_numpy(scores * self.temperature).double().softmax(1)[:, 0].numpy()
        if self.signed:
            return scores[:, 0] - scores[:, 1:].max(axis=1)
        return scores[:, 0]


def refuse_others(about: Mapping[str, Any], name: str, weights: str, where: str) -> None:
    """Refuse features of another model: by its weights where the file says them, else by its name.

    Raises:
        UserError: they are another's.
    """
    made, known = str(about.get("encoder") or ""), str(about.get("weights") or "")
    if known and known != weights:
        raise UserError(
            f"{where}: features of other weights ({made or 'no name'}, {known}) than the checkpoint's ({weights}): "
            "give the checkpoint that made them, or extract them again with this one"
        )
    if not known and made != name:
        raise UserError(
            f"{where}: features of encoder {made or '(not said)'!r}, the checkpoint is {name!r}: give the checkpoint "
            f"that made them; if it is the same under another name, say source.encoder.name={made or 'NAME'}"
        )


class _MilHeat:
    """What both maps of a slide model share."""

    def __init__(self, model: SlideModel, device: str | torch.device = "cpu") -> None:
        if not hasattr(model, "predict") or not hasattr(model, "refuse"):
            raise UserError(
                "the checkpoint is no slide model: give one of medclip train experiment=mil_…, or say source=text"
            )
        self.model: Any = model
        self.model.to(device).eval()
        self.signed = False

    def bag(self, features: np.ndarray, about: Mapping[str, Any], where: str) -> Float[Tensor, "n d"]:
        """On the model's device.

        Raises:
            UserError: the features are not those that the model was trained on.
        """
        made = about.get("encoder")
        self.model.refuse(features.shape[1], None if made is None else str(made), where)
        return torch.from_numpy(features).to(self.model.device)


class AttentionHeat(_MilHeat):
    """What a slide model attends to, times the number of patches: 1 is an even share.

    Args:
        model: of slides.
        branch: of several attentions (CLAM-MB has one a class, ACMIL one a token): its number, or the class; None: the
            mean of all.
        device: to run on.

    Raises:
        UserError: no slide model.
    """

    def __init__(self, model: SlideModel, branch: int | str | None = None, device: str | torch.device = "cpu") -> None:
        super().__init__(model, device)
        self.branch = branch
        self.name = "attention" if branch is None else f"attention {branch}"
        which = "" if branch is None else f" of branch {branch}"
        self.label = f"attention{which}, as a multiple of an even share"

    @torch.inference_mode()
    def __call__(self, features: np.ndarray, about: Mapping[str, Any], where: str) -> np.ndarray:
        """(n,) values, 1 in the mean.

        Raises:
            UserError: features of another model, or no such branch.
        """
        attention = self.model.predict(self.bag(features, about, where)[None]).attention[0]
        one = attention.mean(0) if self.branch is None else attention[self._row(len(attention))]
        return (one * len(one)).double().cpu().numpy()

    def _row(self, count: int) -> int:
        names = list(self.model.classes) if count == len(self.model.classes) else []
        row = names.index(self.branch) if self.branch in names else self.branch
        if isinstance(row, bool) or not isinstance(row, int) or not 0 <= row < count:
            said = f", or of {', '.join(names)}" if names else ""
            raise UserError(
                f"source.branch={self.branch}: the model has {count} attentions: choose 0 to {count - 1}{said}"
            )
        return row


class ClassHeat(_MilHeat):
    """The probability of a class (or the risk) that a slide model gives each patch alone.

    Args:
        model: of slides.
        of: the class, by name or number; None: the last of two, the only one, or the risk.
        device: to run on.

    Raises:
        UserError: no slide model, or no such class.
    """

    def __init__(self, model: SlideModel, of: int | str | None = None, device: str | torch.device = "cpu") -> None:
        super().__init__(model, device)
        self.row = None if model.target == "survival" else _class(list(model.classes), of)
        if self.row is None and of is not None:
            raise UserError(f"source.of={of}: a survival model has one risk and no classes: leave it out")
        found = "risk" if self.row is None else model.classes[self.row]
        self.name = found
        self.label = "risk of each patch alone" if self.row is None else f"probability of {found}, each patch alone"

    @torch.inference_mode()
    def __call__(self, features: np.ndarray, about: Mapping[str, Any], where: str) -> np.ndarray:
        """(n,) values.

        Raises:
            UserError: features of another model.
        """
        parts = [self.model.predict(part[:, None]).scores for part in self.bag(features, about, where).split(_BAGS)]
        scores = torch.cat(parts)
        return (scores if self.row is None else scores[:, self.row]).double().cpu().numpy()


def _class(names: list[str], of: int | str | None) -> int:
    if of is None and len(names) <= 2:
        return len(names) - 1
    row = names.index(str(of)) if str(of) in names else of
    if isinstance(row, bool) or not isinstance(row, int) or not 0 <= row < len(names):
        raise UserError(f"source.of={of}: choose one of the model's classes: {', '.join(names)}")
    return row


def _sentences(words: Sequence[str] | str) -> list[str]:
    found = [words] if isinstance(words, str) else [str(one) for one in words]
    return [one.strip() for one in found if one.strip()]


def _quoted(words: Sequence[str]) -> str:
    return ", ".join(f"“{one}”" for one in words)
