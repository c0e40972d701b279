"""Questions about images, answered by a model that chooses among known answers.

Accuracies overall and of closed and open questions by their true type, over kinds, organs and modalities; whether the
model tells the types; BLEU of open answers; and beside every model what it answers without the image, and with another
one: what is left is language bias. Intervals are by image (or whatever `data.group` says).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from medclip.evals.result import Advance, EvalData, Result, Role
from medclip.evals.vqa_controls import QUESTION_ONLY, SHUFFLED
from medclip.evals.vqa_details import VqaDetails
from medclip.evals.vqa_gallery import choose, draw
from medclip.evals.vqa_outcomes import ACCURACIES, TYPES, Question, VqaOutcomes
from medclip.infer.scorers import seen_rows
from medclip.infer.vqa import Answerer, Pool, Replies, answers_about, ask, bare, joined, read
from medclip.types import UserError

UNKNOWN = 5  # answers named


class Vqa:
    """Answer questions about images.

    Args:
        data: samples whose metadata has the field `vqa` (sources with `questions`).
        name: of the evaluation, as reports and messages call it.
        role: "domain" (its change is a gain or a failed one) or "retention" (its loss is forgetting).
        controls: answer each question without the right image, too; False saves two thirds of the time.
        seed: of who gets whose image.
        several: what stands between several right answers, each of which is right by itself; None: there is one.
    """

    takes = ("vqa",)

    def __init__(
        self,
        data: EvalData,
        *,
        name: str,
        role: Role = "domain",
        controls: bool = True,
        seed: int = 0,
        several: str | None = None,
    ) -> None:
        self.data = data
        self.name = name
        self.role: Role = role
        self.controls = controls
        self.seed = seed
        self.several = several

    @torch.inference_mode()
    def __call__(
        self, clip: Answerer, *, batch_size: int = 64, workers: int = 0, advance: Advance = lambda done: None
    ) -> Result:
        """Evaluate one checkpoint.

        Raises:
            UserError: no question that can be used, or a checkpoint that tells types instead of answering.
        """
        names = list(map(str, clip.description["answers"]))
        if set(names) == set(TYPES):
            raise UserError(
                f"evaluation {self.name!r}: the checkpoint tells closed from open questions, and answers none: put it "
                "into a QCR (model.types=CHECKPOINT) and evaluate that"
            )
        known = [bare(name) for name in names]
        found = self._pass(clip, batch_size, workers, advance)
        replies = joined(found.replies)
        outcomes = VqaOutcomes(
            found.keys,
            found.groups,
            found.questions,
            replies.said(known),
            replies.probability.astype(np.float64),
            replies.closed.astype(np.float64),
            self._controls(clip, found, known, batch_size) if self.controls else {},
        )
        majority, majority_of = most_frequent(names, found.questions)
        heard = set(known)
        chooses = all(text is None for text in replies.texts)  # else it can say what no training question had
        unknown = Counter(q.answer for q in found.questions if chooses and heard.isdisjoint(q.rights))
        rows = {right: choose(outcomes, found.pool.held, right) for right in (True, False)}
        return Result(
            task="visual_question_answering",
            role=self.role,
            headline=tuple(ACCURACIES),
            outcomes=outcomes,
            details=VqaDetails(
                images=len(found.pool.names),
                questions={kind: sum(question.type == kind for question in found.questions) for kind in TYPES},
                answers=len(names),
                unknown=unknown.total(),
                unknown_answers=unknown.most_common(UNKNOWN),
                majority=majority,
                majority_of=majority_of,
                parts=outcomes.parts,
                controls=list(outcomes.controls),
                right=draw(clip, outcomes, found.pool, rows[True]),
                wrong=draw(clip, outcomes, found.pool, rows[False]),
            ),
            chance=chance(outcomes, majority),
            skipped=found.skipped,
        )

    def _pass(self, model: Answerer, batch_size: int, workers: int, advance: Advance) -> _Answered:
        found = _Answered(Pool(seed=self.seed))
        lacking = 0
        for batch in self.data.batches(model.preprocess, batch_size, workers):
            assert "key" in batch and "meta" in batch
            abouts = [meta["raw"].get("vqa") for meta in batch["meta"]]
            usable = [row for row, about in enumerate(abouts) if about]
            lacking += len(abouts) - len(usable)
            asked = [Question.of(abouts[row], self.several) for row in usable]
            if asked:
                seen = seen_rows(batch, usable)
                found.replies.append(read(ask(model, seen, [question.question for question in asked])))
                found.questions += asked
                found.keys += [batch["key"][row] for row in usable]
                found.groups += [str(batch["meta"][row]["group"]) for row in usable]
                for row, question in enumerate(asked):
                    found.pool.see(question.image, seen, row)
            advance(len(batch["key"]))
        found.skipped = dict(Counter(reason for _, reason, _ in self.data.bad))
        found.skipped |= {"no question": lacking} if lacking else {}
        if not found.questions:
            reasons = ", ".join(f"{count} {why}" for why, count in found.skipped.items()) or "no sample at all"
            raise UserError(
                f"evaluation {self.name!r} has nothing to evaluate ({reasons}): say in "
                f"evals.{self.name}.data.sources which fields hold question and answer (questions: …)"
            )
        return found

    def _controls(self, model: Answerer, found: _Answered, known: list[str], batch_size: int) -> dict[str, list[str]]:
        questions = [question.question for question in found.questions]
        held, others = found.pool.held, found.pool.others()
        names = len(questions) * [next(iter(held))]
        blind = answers_about(model, held, names, questions, batch_size, without_image=True)
        answers: dict[str, list[str]] = {QUESTION_ONLY: blind.said(known)}
        if others:  # else there is one image
            names = [others[question.image] for question in found.questions]
            astray = answers_about(model, held, names, questions, batch_size)
            answers[SHUFFLED] = astray.said(known)
        return answers


@dataclass
class _Answered:
    """What a pass over the set gathers, a row a question."""

    pool: Pool
    questions: list[Question] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    replies: list[Replies] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)


def most_frequent(names: Sequence[str], questions: Sequence[Question]) -> tuple[dict[str, str], str]:
    """The most frequent answer of each type, and where it is so.

    A vocabulary that names types lists each one's answers from the most frequent in training to the rarest
    (`data.questions.vocabulary`); without types it does not say which are closed, and the evaluated questions are
    counted.
    """
    first = {kind: next((bare(n) for n in names if n.startswith(f"{kind}: ")), None) for kind in TYPES}
    if any(first.values()):
        return {kind: answer for kind, answer in first.items() if answer is not None}, "the training questions"
    counts = {kind: Counter(right for q in questions if q.type == kind for right in q.rights) for kind in TYPES}
    return {kind: own.most_common(1)[0][0] for kind, own in counts.items() if own}, "these very questions"


def chance(outcomes: VqaOutcomes, majority: dict[str, str]) -> dict[str, float]:
    """What one answer for all closed and one for all open questions reaches, and the more frequent type for all."""
    given = [majority.get(question.type, "") for question in outcomes.questions]
    unseen = replace(outcomes, given=given, closed=np.full(len(given), np.nan), controls={})
    values = {name: float(value[0]) for name, value in unseen.values(np.ones((1, len(given)))).items()}
    closed = np.mean([question.type == "closed" for question in outcomes.questions])
    values |= {f"{name}:{control}": values[name] for name in ACCURACIES for control in outcomes.controls}
    values["routing_accuracy"] = float(max(closed, 1 - closed))
    return {name: value for name, value in values.items() if value == value}
