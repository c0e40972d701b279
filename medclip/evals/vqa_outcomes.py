"""What was answered to each question about an image, and every metric of it under any sample weights.

An answer is right if its words are those of the right one, both as `data.answers` normalises them. The branch that it
came from does not matter; whether a model tells closed from open questions is a metric of its own. Open and closed
accuracies are by the questions' true types, so a question that was led astray counts where it belongs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float

from medclip.evals.vqa_bleu import LONGEST, BleuCounts
from medclip.evals.vqa_details import Part

TYPES = ("closed", "open")
ACCURACIES = {"acc1": None, "closed_accuracy": "closed", "open_accuracy": "open"}  # metric -> type of its questions
OF_WHAT = ("kind", "organ", "modality")
MOST_PARTS = 24  # of one sort; the rarest are left out
_SEVERAL = re.compile(r"\s*[,;|]\s*")  # "POS, PRES" is of both kinds


@dataclass(frozen=True)
class Question:
    """A question as the data have it (the field `vqa`), all words normalised."""

    id: str
    image: str
    question: str
    answer: str
    type: str
    kind: str = ""
    organ: str = ""
    modality: str = ""
    rights: tuple[str, ...] = ()  # answers that are right; () for `answer` alone

    @classmethod
    def of(cls, about: Mapping[str, str], several: str | None = None) -> Question:
        """From the field `vqa` of a sample's metadata; `several` stands between right answers in its `answer`."""
        words = {name: str(about.get(name, "")) for name in cls.__dataclass_fields__ if name != "rights"}
        rights = words["answer"].split(several) if several else [words["answer"]]
        return cls(**words, rights=tuple(right.strip() for right in rights if right.strip()))

    def answered_by(self, given: str) -> bool:
        """Whether an answer is right."""
        return given in (self.rights or (self.answer,))

    def values(self, of: str) -> list[str]:
        """What it says of its `kind`, `organ` or `modality`."""
        return [value for value in _SEVERAL.split(getattr(self, of)) if value]


def parts_of(questions: Sequence[Question]) -> list[Part]:
    """Kinds, organs and modalities with the number of their questions, where there are several of a sort."""
    found = []
    for of in OF_WHAT:
        counts = Counter(value for question in questions for value in question.values(of))
        if len(counts) > 1:
            kept = sorted(counts, key=lambda name: (-counts[name], name))[:MOST_PARTS]
            found += [Part(of, name, counts[name]) for name in sorted(kept, key=str.casefold)]
    return found


@dataclass(frozen=True)
class VqaOutcomes:
    """Questions and answers, row by row.

    `closed` is the probability that the model gives a question of being closed, NaN where it gives none; `controls` are
    the answers without the right image.
    """

    keys: list[str]
    groups: list[str]
    questions: list[Question]
    given: list[str]
    probability: Float[np.ndarray, " n"]
    closed: Float[np.ndarray, " n"]
    controls: dict[str, list[str]] = field(default_factory=dict)

    @cached_property
    def parts(self) -> list[Part]:
        return parts_of(self.questions)

    @property
    def right(self) -> Bool[np.ndarray, " n"]:
        return self._right(self.given)

    @property
    def routed(self) -> list[str]:
        """The type that the model takes each question for; "" where it does not tell."""
        return ["" if p != p else TYPES[0] if p >= 0.5 else TYPES[1] for p in self.closed.tolist()]

    def values(self, weights: Float[np.ndarray, "b n"]) -> dict[str, Float[np.ndarray, " b"]]:
        """Every metric under each row of weights.

        `METRIC:CONTROL` is an accuracy without the right image, `acc1:kind: NAME` that of a part.
        """
        names, hits, taken = self._table
        total = weights @ taken
        means = np.divide(weights @ (hits * taken), total, out=np.full(total.shape, np.nan), where=total > 0)
        found = {name: means[:, i] for i, name in enumerate(names)}
        # After the four figures of all questions, before those of parts.
        head = {name: found.pop(name) for name in (*ACCURACIES, "routing_accuracy")}
        is_open = self._is("open")
        bleu = {f"bleu{n}": self._bleu.bleu(n, weights[:, is_open]) for n in range(1, LONGEST + 1)}
        return head | bleu | found

    @cached_property
    def _table(self) -> tuple[list[str], Float[np.ndarray, "n m"], Float[np.ndarray, "n m"]]:
        """Metrics that are means: their names, each row's value, and whether it is one of theirs."""
        everyone = np.ones(len(self.keys), dtype=bool)
        rows = {None: everyone} | {kind: self._is(kind) for kind in TYPES}
        told = np.isfinite(self.closed)
        columns = [(name, self.right, rows[kind]) for name, kind in ACCURACIES.items()]
        columns.append(("routing_accuracy", (self.closed >= 0.5) == rows["closed"], told))
        for control, given in self.controls.items():
            right = self._right(given)
            columns += [(f"{name}:{control}", right, rows[kind]) for name, kind in ACCURACIES.items()]
        for part in self.parts:
            own = np.array([part.name in question.values(part.of) for question in self.questions])
            columns.append((f"acc1:{part.label}", self.right, own))
        names, hits, taken = zip(*columns, strict=True)
        return list(names), np.stack(hits, axis=1).astype(np.float64), np.stack(taken, axis=1).astype(np.float64)

    @cached_property
    def _bleu(self) -> BleuCounts:
        own = np.flatnonzero(self._is("open"))
        asked = [self.questions[i] for i in own]
        return BleuCounts.of([self.given[i] for i in own], [q.rights or (q.answer,) for q in asked])

    def _is(self, kind: str) -> Bool[np.ndarray, " n"]:
        return np.array([question.type == kind for question in self.questions], dtype=bool)

    def _right(self, given: Sequence[str]) -> Bool[np.ndarray, " n"]:
        return np.array([q.answered_by(said) for said, q in zip(given, self.questions, strict=True)], dtype=bool)
