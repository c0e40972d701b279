"""A model that answers questions about images by choosing among known answers: encoders, a head, and perhaps a router.

The visual encoder makes objects of an image, the question encoder states of its words, the head fuses them into logits
of the answers. Where the head has a branch for closed and one for open questions (QCR), the type of each question is
known in training, by its right answer; in tests the router tells it from the words.

Answers whose names begin with "closed: " are those of closed questions, and come first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from medclip.models.encoder import refuse_unlike
from medclip.models.parts import describe, find, rebuild
from medclip.models.weights import read_checkpoint
from medclip.types import CLOSED, Asked, Batch, Preprocess, QuestionEncoder, UserError

TYPES = ["closed", "open"]  # the answers of a model that tells types


class Answered(NamedTuple):
    """What the losses and the task get, a row a sample.

    `drawn` is the denoising auto-encoder's mean squared error, 0 without one. `own` is False for logits that are none
    of the row's: of the other branch, or of both where the right answer, and so the type, is not known. `closed` are
    the log-odds of "closed" by a router that is trained too, else NaN. `attention` sums to 1 for each glimpse.
    """

    logits: Float[Tensor, "b answers"]
    drawn: Float[Tensor, " b"]
    attention: Float[Tensor, "b glimpses objects words"]
    own: Bool[Tensor, "b answers"]
    closed: Float[Tensor, " b"]


class Prediction(NamedTuple):
    """What evaluations get. Scores are -inf where the router led away; `closed` is NaN without one."""

    scores: Float[Tensor, "b answers"]
    closed: Float[Tensor, " b"]
    attention: Float[Tensor, "b glimpses objects words"]


class Router(nn.Module):
    """Token ids (b, L) -> log-odds (b,) of "closed".

    Args:
        questions: an encoder of its own.
        head: a `QuestionType` without its sizes.
        frozen: it has been trained already, and stays as it is.
    """

    def __init__(self, questions: QuestionEncoder, head: partial[Any], *, frozen: bool = False) -> None:
        super().__init__()
        assert isinstance(questions, nn.Module)
        self.questions = questions
        self.frozen = frozen
        self._made_by = head
        self.head = head(0, questions, 2, 0)
        if frozen:
            self.requires_grad_(False)

    @property
    def description(self) -> dict[str, Any]:
        about: Any = self.questions
        return {"questions": about.description, "head": describe(self._made_by), "frozen": self.frozen}

    @classmethod
    def from_description(cls, fields: Mapping[str, Any]) -> Router:
        questions: Any = rebuild(fields["questions"])
        return cls(questions, find(fields["head"]), frozen=fields["frozen"])

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and not self.frozen)

    def forward(self, text: Int64[Tensor, "b L"]) -> Float[Tensor, " b"]:
        logits = self.head(None, self.questions(text), text)[0]
        return logits[:, 0] - logits[:, 1]


class VqaModel(nn.Module):
    """`Batch` -> `Answered`.

    Args:
        visual: `Batch -> objects (b, v, dim)`, or those and a mean squared error a row (b,); None: the image is not
            looked at.
        questions: token ids -> `Asked`.
        head: (objects' dim, questions, answers, closed answers) -> module.
        answers: names of the logits.
        router: for a head with branches.

    Raises:
        UserError: answers that do not go with the head.
    """

    def __init__(
        self,
        visual: nn.Module | None,
        questions: QuestionEncoder,
        head: partial[Any],
        answers: Sequence[str],
        router: Router | None = None,
    ) -> None:
        super().__init__()
        assert isinstance(questions, nn.Module)
        self.answers = list(map(str, answers))
        if not self.answers or len(set(self.answers)) < len(self.answers):
            raise UserError("model.answers must name each answer once (data.labels.names, see conf/data/vqa_rad.yaml)")
        closed = [name.startswith(CLOSED) for name in self.answers]
        self.closed = sum(closed)
        if not all(closed[: self.closed]):
            raise UserError(f'model.answers: those that begin with "{CLOSED}" must come first')
        self.visual: Any = visual
        self.questions: Any = questions
        self._made_by = head
        self.routed = bool(getattr(head.func, "routed", False))
        if self.routed and not 0 < self.closed < len(self.answers):
            raise UserError(
                f"this head has a branch for closed and one for open questions, but {self.closed} of "
                f"{len(self.answers)} answers are closed: say data.labels.field=vqa.slot, with questions of both types"
            )
        if self.routed and router is None:
            raise UserError("this head needs to know which questions are closed: say model.types (conf/model/vqa_qcr)")
        self.head: Any = head(0 if visual is None else self.visual.dim, questions, len(self.answers), self.closed)
        self.router = router
        own = None if visual is None else self.visual.preprocess
        self.preprocess: Preprocess = own or Preprocess(size=(32, 32) if visual is None else (224, 224))
        self.tokenizer = questions.tokenizer
        self.register_buffer("_here", torch.zeros(()), persistent=False)
        self._here: Tensor

    @property
    def device(self) -> torch.device:
        return self._here.device

    @property
    def description(self) -> dict[str, Any]:
        """Plain data from which `vqa_from` makes this model again, without its weights."""
        return {
            "kind": "vqa",
            "answers": self.answers,
            "visual": None if self.visual is None else self.visual.description,
            "questions": self.questions.description,
            "head": describe(self._made_by),
            "router": None if self.router is None else self.router.description,
            "preprocess_cfg": self.preprocess.as_dict(),
        }

    def forward(self, batch: Batch) -> Answered:
        """Logits of `batch["image"]` and `batch["text"]`; a row's branch is that of its `batch["label"]`, if any."""
        objects, drawn, asked, text = self._read(batch)
        odds = self._odds(text)
        known = torch.ones(len(text), dtype=torch.bool, device=text.device)
        closed, label = odds >= 0, batch.get("label")
        if self.routed and label is not None:
            right = label == 1
            known = right.any(1)
            closed = right[:, : self.closed].any(1)
        logits, own, attention = self.head(objects, asked, text, closed)
        trained = self.router is not None and not self.router.frozen
        return Answered(logits, drawn, attention, own & known[:, None], odds if trained else odds.detach() * math.nan)

    def answer(self, batch: Batch) -> Prediction:
        """Scores of the answers, of the branch that the router chooses."""
        objects, _, asked, text = self._read(batch)
        odds = self._odds(text)
        logits, own, attention = self.head(objects, asked, text, odds >= 0)
        return Prediction(logits.masked_fill(~own, -math.inf), odds.sigmoid(), attention)

    def _odds(self, text: Int64[Tensor, "b L"]) -> Float[Tensor, " b"]:
        if self.router is None:
            return torch.full((len(text),), math.nan, device=text.device)
        return self.router(text)

    def _read(
        self, batch: Batch
    ) -> tuple[Float[Tensor, "b v dim"] | None, Float[Tensor, " b"], Asked, Int64[Tensor, "b L"]]:
        text = batch.get("text")
        if text is None:
            raise UserError(
                "the data hand out no questions: say which fields hold them (data.sources.0.questions, see conf/data/"
                "vqa.yaml)"
            )
        seen = None if self.visual is None else self.visual(batch)
        objects, drawn = seen if isinstance(seen, tuple) else (seen, torch.zeros(len(text), device=text.device))
        return objects, drawn, self.questions(text), text


def build_vqa(
    answers: Sequence[str] | None,
    questions: QuestionEncoder,
    head: partial[Any],
    visual: nn.Module | None = None,
    types: str | partial[Any] | None = None,
) -> VqaModel:
    """A model to be trained.

    Args:
        answers: names of the logits.
        questions: see `VqaModel`, as are `head` and `visual`.
        head: without its sizes.
        visual: None: the image is not looked at.
        types: what tells closed questions from open ones, for a head that asks for it: a `QuestionType` without its
            sizes, to be trained beside the answers, or a checkpoint of experiment=medvqa_type, which stays as it is.

    Raises:
        UserError: parts that do not go together, or a checkpoint that does not fit.
    """
    if not answers:
        raise UserError("the model has no answers: say data.labels (names, field: vqa.slot; see conf/data/vqa.yaml)")
    router = None
    if isinstance(types, str):
        router = trained_router(types, questions)
    elif types is not None:
        router = Router(questions.another(), types)
    return VqaModel(visual, questions, head, answers, router)


def vqa_from(description: Mapping[str, Any]) -> VqaModel:
    """The described model (`VqaModel.description`) with random weights."""
    visual, router = description["visual"], description["router"]
    questions: Any = rebuild(description["questions"])
    return VqaModel(
        None if visual is None else rebuild(visual),
        questions,
        find(description["head"]),
        description["answers"],
        None if router is None else Router.from_description(router),
    )


def trained_router(path: str, questions: QuestionEncoder) -> Router:
    """The type classifier of a checkpoint, frozen.

    Raises:
        UserError: no such checkpoint, one of another kind, or of other words.
    """
    content = read_checkpoint(Path(path).expanduser())
    about = content.get("medclip")
    if not isinstance(about, Mapping) or about.get("kind") != "vqa" or list(about.get("answers", ())) != TYPES:
        raise UserError(f"model.types={path} tells no types: give a checkpoint of medclip train experiment=medvqa_type")
    router = Router.from_description({"questions": about["questions"], "head": about["head"], "frozen": True})
    text = ["is there a lung", "what is this"]
    ours, theirs = questions.tokenizer, router.questions.tokenizer
    if getattr(ours, "words", None) != getattr(theirs, "words", None) or not torch.equal(ours(text), theirs(text)):
        raise UserError(
            f"model.types={path} was trained on other words than model.questions has: train experiment=medvqa_type on "
            "the same data.sources, with the same model.questions.length"
        )
    names = {"model.questions.": "questions.", "model.head.": "head."}
    state = {
        new + key.removeprefix(old): value
        for key, value in content["state_dict"].items()
        for old, new in names.items()
        if key.startswith(old)
    }
    refuse_unlike(router.state_dict(), state, path)
    router.load_state_dict(state)
    return router
