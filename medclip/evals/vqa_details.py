"""What the report shows of questions about images besides their metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AnsweredExample:
    """A question of the gallery.

    `guesses` are the likeliest answers with their probability. `pictures` (JPEG) are the image, then, where the model
    looks at several objects that lie on a grid, the image with the attention of each glimpse. `shares[g][w]` is the
    share of glimpse g that falls on word w of `words`; empty where it is the same for all.
    """

    key: str
    question: str
    type: str
    kind: str
    answer: str
    guesses: list[tuple[str, float]]
    routed: str  # closed | open, or "" where the model does not tell
    pictures: list[bytes]
    words: list[str]
    shares: list[list[float]]


@dataclass(frozen=True)
class Part:
    """Questions that have something in common: their kind, the organ, or the modality of the image."""

    of: str
    name: str
    questions: int

    @property
    def label(self) -> str:
        """What follows the colon in its metrics."""
        return f"{self.of}: {self.name}"


@dataclass(frozen=True)
class VqaDetails:
    """Sizes, parts and examples. Answers count as unknown where the model cannot give them."""

    images: int
    questions: dict[str, int]  # closed, open -> questions
    answers: int  # that the model can give
    unknown: int  # questions whose right answer is none of these
    unknown_answers: list[tuple[str, int]]  # some of them, the most frequent first
    majority: dict[str, str]  # type -> the answer that the chance level always gives
    majority_of: str  # whose most frequent answer that is
    parts: list[Part]
    controls: list[str]
    right: list[AnsweredExample]
    wrong: list[AnsweredExample]
