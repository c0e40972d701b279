"""Closed questions as µ-Bench asks CLIPs (arXiv:2407.01791): each option becomes a caption, the most similar one wins.

A sample brings its own questions in its metadata: `{question, options, answer}`, `answer` being one of the options, or
`answer_idx` its place. An image may have several; intervals are by image (or whatever `data.group` says), since its
questions share one feature.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from medclip.evals.collect import spread_evenly, thumbnail
from medclip.evals.metrics import weighted_mean
from medclip.evals.result import Advance, ClosedQuestionsDetails, EvalData, QuestionExample, Result, Role
from medclip.infer.zeroshot import embed_texts
from medclip.types import DualEncoder, UserError

EXAMPLES = 12


@dataclass(frozen=True)
class Question:
    """One question: its kind, its words (may be empty), the options and which is right."""

    kind: str
    words: str
    options: list[str]
    answer: int


@dataclass(frozen=True)
class ClosedQuestionsOutcomes:
    """Whether each question was answered right."""

    keys: list[str]
    groups: list[str]
    kinds: list[str]
    correct: Bool[np.ndarray, " q"]

    def values(self, weights: Float[np.ndarray, "b q"]) -> dict[str, Float[np.ndarray, " b"]]:
        """Accuracy under each row of weights, and `acc1:KIND` over one kind where there are several."""
        found = {"acc1": weighted_mean(self.correct, weights)}
        names = sorted(set(self.kinds))
        for name in names if len(names) > 1 else []:
            own = np.array([kind == name for kind in self.kinds])
            found[f"acc1:{name}"] = weighted_mean(self.correct[own], weights[:, own])
        return found


@dataclass
class _Asked:
    """What a pass over the set gathers, a row a question."""

    features: list[Tensor] = field(default_factory=list)  # of each image
    thumbnails: list[bytes] = field(default_factory=list)
    image: list[int] = field(default_factory=list)  # number of each question's image
    questions: list[Question] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)


class ClosedQuestions:
    """Answer multiple-choice questions on images by similarity.

    Args:
        data: samples whose metadata holds the questions.
        name: of the evaluation, as reports and messages call it.
        role: "domain" (its change is a gain or a failed one) or "retention" (its loss is forgetting).
        questions: fields that hold a question each, dots reach inside; None where the metadata itself is one.
        template: how an option becomes a caption: `{option}`, and `{question}` where it is wanted.
        kind: field of what a question is about, for accuracy by kind; None for the names of `questions`.

    Raises:
        UserError: a template without `{option}`.
    """

    def __init__(
        self,
        data: EvalData,
        *,
        name: str,
        role: Role = "domain",
        questions: Sequence[str] | None = None,
        template: str = "{option}",
        kind: str | None = None,
    ) -> None:
        if "{option}" not in template:
            raise UserError(f"evals.{name}.template={template!r}: write {{option}} where the option belongs")
        self.data = data
        self.name = name
        self.role: Role = role
        self.questions = list(questions) if questions else [""]
        self.template = template
        self.kind = kind

    @torch.inference_mode()
    def __call__(
        self, clip: DualEncoder, *, batch_size: int = 64, workers: int = 0, advance: Advance = lambda done: None
    ) -> Result:
        """Evaluate one checkpoint.

        Raises:
            UserError: no sample with a question.
        """
        asked, skipped = self._collect(clip, batch_size, workers, advance)
        texts = list(dict.fromkeys(self._caption(q, option) for q in asked.questions for option in q.options))
        place = {text: i for i, text in enumerate(texts)}
        captions = embed_texts(clip, texts).double()
        images = torch.cat(asked.features).double()
        scores = [
            (captions[[place[self._caption(q, option)] for option in q.options]] @ images[i]).numpy()
            for q, i in zip(asked.questions, asked.image, strict=True)
        ]
        correct = np.array([int(s.argmax()) == q.answer for s, q in zip(scores, asked.questions, strict=True)])
        kinds = [q.kind for q in asked.questions]
        chance = {"acc1": float(np.mean([1 / len(q.options) for q in asked.questions]))}
        for kind in set(kinds):
            own = [1 / len(q.options) for q in asked.questions if q.kind == kind]
            chance[f"acc1:{kind}"] = float(np.mean(own))
        return Result(
            task="closed_questions",
            role=self.role,
            headline=("acc1",),
            outcomes=ClosedQuestionsOutcomes(asked.keys, asked.groups, kinds, correct),
            details=ClosedQuestionsDetails(
                images=len(images),
                kinds=dict(sorted(Counter(kinds).items())),
                template=self.template,
                examples=[_example(asked, scores, n) for n in spread_evenly(len(scores), EXAMPLES)],
            ),
            chance=chance,
            skipped=skipped,
        )

    def _caption(self, question: Question, option: str) -> str:
        return self.template.replace("{question}", question.words).replace("{option}", option)

    def _collect(
        self, clip: DualEncoder, batch_size: int, workers: int, advance: Advance
    ) -> tuple[_Asked, dict[str, int]]:
        asked = _Asked()
        lacking: Counter[str] = Counter()
        images = 0
        for batch in self.data.batches(clip.preprocess, batch_size, workers):
            assert "key" in batch and "meta" in batch and "image" in batch
            usable: list[int] = []
            for row, (key, meta) in enumerate(zip(batch["key"], batch["meta"], strict=True)):
                found = [(path, self._question(meta["raw"], path)) for path in self.questions]
                questions = [(path, q) for path, q in found if isinstance(q, Question)]
                if not questions:
                    lacking[str(found[0][1])] += 1
                    continue
                for path, question in questions:
                    asked.questions.append(question)
                    asked.image.append(images)
                    asked.keys.append(f"{key}?{path}" if path else key)
                    asked.groups.append(str(meta["group"]))
                images += 1
                usable.append(row)
            if usable:
                asked.features.append(clip.encode_image(batch["image"][usable].to(clip.device)).float().cpu())
                asked.thumbnails += [thumbnail(batch["image"][row]) for row in usable]
            advance(len(batch["key"]))
        skipped = dict(Counter(reason for _, reason, _ in self.data.bad)) | dict(lacking)
        if not asked.questions:
            reasons = ", ".join(f"{count} {why}" for why, count in skipped.items()) or "no sample at all"
            raise UserError(
                f"evaluation {self.name!r} has nothing to evaluate ({reasons}): mend evals.{self.name}.data, or say in "
                f"evals.{self.name}.questions which fields hold options and answer"
            )
        return asked, skipped

    def _question(self, raw: Mapping[str, Any], path: str) -> Question | str:
        """The question at a path, or why there is none."""
        found = _lookup(raw, path) if path else raw
        if not isinstance(found, Mapping) or found.get("options") is None:
            return "no question"
        options = found["options"]
        if not isinstance(options, list) or len(options) < 2 or not all(isinstance(o, str) for o in options):
            return "bad options"
        answer = found.get("answer_idx")
        if answer is None and options.count(found.get("answer")) == 1:
            answer = options.index(found["answer"])
        if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(options):
            return "bad answer"
        kind = _lookup(raw, self.kind) if self.kind is not None else path.rpartition(".")[2]
        return Question(str(kind), str(found.get("question") or ""), options, answer)


def _lookup(raw: Any, path: str) -> Any:
    for name in path.split("."):
        raw = raw.get(name) if isinstance(raw, Mapping) else None
    return raw


def _example(asked: _Asked, scores: list[np.ndarray], n: int) -> QuestionExample:
    question = asked.questions[n]
    order = np.argsort(-scores[n], kind="stable")
    return QuestionExample(
        key=asked.keys[n],
        thumbnail=asked.thumbnails[asked.image[n]],
        question=question.words,
        options=[(question.options[o], float(scores[n][o])) for o in order],
        answer=question.options[question.answer],
    )
