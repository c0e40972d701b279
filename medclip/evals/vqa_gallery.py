"""Questions for the report, right and wrong ones, with what the model looked at: in the image, and in the words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np
from jaxtyping import Float
from torch import Tensor

from medclip.evals.gallery import overlay
from medclip.evals.vqa_details import AnsweredExample
from medclip.evals.vqa_outcomes import VqaOutcomes
from medclip.infer.vqa import Answerer, Pool, ask, bare, rows_of, words_of

EACH = 6  # right ones, and wrong ones
GUESSES = 3
GLIMPSES = 4  # drawn over the image; all are shown over the words
_EVEN = 1e-4


def choose(outcomes: VqaOutcomes, held: Iterable[str], right: bool, count: int = EACH) -> list[int]:
    """Up to `count` questions about images in `held` that were answered right (or wrong), closed and open in turn.

    They are drawn by their ids, the same for every checkpoint as far as these answer alike; no image comes twice where
    there are others.
    """
    there = set(held)
    rows = [i for i, hit in enumerate(outcomes.right.tolist()) if hit == right and outcomes.questions[i].image in there]
    rows.sort(key=lambda i: blake2b(outcomes.questions[i].id.encode(), digest_size=8).digest())
    seen: dict[str, int] = {}
    places: dict[str, int] = {}
    order = []
    for i in rows:
        question = outcomes.questions[i]
        again = seen[question.image] = seen.get(question.image, -1) + 1
        turn = places.get(question.type, 0)
        places[question.type] = turn + 1
        order.append((again, turn, question.type, i))
    return [i for *_, i in sorted(order)[:count]]


def draw(model: Answerer, outcomes: VqaOutcomes, pool: Pool, rows: Sequence[int]) -> list[AnsweredExample]:
    """These questions with their pictures; their images must be held."""
    if not rows:
        return []
    held = pool.held
    asked = [outcomes.questions[i] for i in rows]
    seen = rows_of(held, [question.image for question in asked])
    reply = ask(model, seen, [question.question for question in asked])
    names = [bare(name) for name in model.description["answers"]]
    examples = []
    for place, (row, question) in enumerate(zip(rows, asked, strict=True)):
        scores = reply.scores[place].float().cpu()
        best = [i for i in scores.argsort(descending=True, stable=True)[:GUESSES].tolist() if scores[i] > -math.inf]
        guesses = [(names[i], float(scores[i].sigmoid())) for i in best]
        if (texts := getattr(reply, "texts", None)) is not None:
            guesses = [(texts[place], float(reply.probability[place]))]  # pyright: ignore
        attention = reply.attention[place].float().cpu().numpy()
        words, shares = by_word(attention, words_of(model.tokenizer, question.question))
        assert "image" in seen
        examples.append(
            AnsweredExample(
                key=outcomes.keys[row],
                question=question.question,
                type=question.type,
                kind=question.kind,
                answer=question.answer,
                guesses=guesses,
                routed=outcomes.routed[row],
                pictures=pictures(seen["image"][place], attention),
                words=words,
                shares=shares,
            )
        )
    return examples


def grid(objects: int) -> tuple[int, int] | None:
    """(side, objects before the first cell) if the objects are the cells of a square, perhaps after a class token."""
    for before in (0, 1):
        side = math.isqrt(max(objects - before, 0))
        if side > 1 and side * side == objects - before:
            return side, before
    return None


def pictures(image: Tensor, attention: Float[np.ndarray, "g v q"]) -> list[bytes]:
    """The image (uint8 (3, h, w)), and with each of the first glimpses over it where its objects are a grid."""
    pixels = image.cpu().numpy()
    found = [overlay(pixels, None)]
    if (cells := grid(attention.shape[1])) is not None:
        side, before = cells
        maps = attention.sum(axis=2)[:, before:].reshape(-1, side, side)
        found += [overlay(pixels, own) for own in maps[:GLIMPSES]]
    return found


def by_word(attention: Float[np.ndarray, "g v q"], words: Sequence[str]) -> tuple[list[str], list[list[float]]]:
    """Each word that is looked at, and its share of each glimpse; positions without a word (padding, a start
    token) are put together at the end.

    No words where every position has the same share, as where a fusion looks at objects alone.
    """
    shares = attention.sum(axis=1)
    if shares.shape[1] != len(words) or np.ptp(shares, axis=1).max() < _EVEN:
        return [], []
    named = [i for i, word in enumerate(words) if word]
    found, columns = [words[i] for i in named], [shares[:, i] for i in named]
    rest = shares.sum(axis=1) - sum(columns, np.zeros(len(shares)))
    if rest.max() > _EVEN:
        found, columns = [*found, "(no word)"], [*columns, rest]
    return found, np.stack(columns, axis=1).tolist()
