"""Questions put to a model that chooses or says an answer: with the image, without one, and with that of another.

What is left of the accuracy without the right image is what the words of the questions give away. Agrawal et al. 2018,
arXiv:1712.00377, call it language bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from medclip.infer.scorers import seen_rows
from medclip.types import CLOSED, OPEN, Batch, Preprocess, Tokenizer, UserError

POOL = 1024  # images held for the passes with others' images: 150 MB at 224 pixels


class Reply(Protocol):
    """What a model says of a batch: scores are -inf for answers that it rules out; `closed` is NaN if not told.

    One that answers in its own words has `texts`, list[str], and their `probability` (b,) too.
    """

    @property
    def scores(self) -> Float[Tensor, "b answers"]: ...

    @property
    def closed(self) -> Float[Tensor, " b"]: ...  # probability that the question is closed

    @property
    def attention(self) -> Float[Tensor, "b glimpses objects words"]: ...


@runtime_checkable
class Answerer(Protocol):
    """A model that answers `batch["text"]` about `batch["image"]` by one of `description["answers"]`."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def preprocess(self) -> Preprocess: ...

    @property
    def description(self) -> Mapping[str, Any]: ...

    @property
    def device(self) -> torch.device: ...

    def answer(self, batch: Batch) -> Reply: ...


class Replies(NamedTuple):
    """What a model answered to n questions: the place of its best answer, that one's probability by a sigmoid, as it
    was trained, the probability that the question is closed, and its own words, None where it chooses."""

    place: Int[np.ndarray, " n"]
    probability: Float[np.ndarray, " n"]
    closed: Float[np.ndarray, " n"]
    texts: Shaped[np.ndarray, " n"]

    def said(self, known: Sequence[str]) -> list[str]:
        """The answers; `known` are those to choose among."""
        return [str(known[i] if text is None else text) for i, text in zip(self.place, self.texts, strict=True)]


def bare(answer: str) -> str:
    """An answer without what it says of its questions' type: "closed: yes" and "yes" are one answer."""
    return next((answer.removeprefix(slot) for slot in (CLOSED, OPEN) if answer.startswith(slot)), answer)


@torch.inference_mode()
def ask(model: Answerer, seen: Batch, questions: Sequence[str]) -> Reply:
    """The model's reply to a question about each row of `seen`.

    Raises:
        UserError: it answers NaN.
    """
    given = {k: v.to(model.device) for k, v in seen.items() if isinstance(v, Tensor)}
    given["text"] = model.tokenizer(list(questions)).to(model.device)
    reply = model.answer(Batch(**given))  # type: ignore[typeddict-item]
    if reply.scores.isnan().any():
        raise UserError("the VQA model answers NaN: its training diverged, or its weights are broken")
    return reply


def read(reply: Reply) -> Replies:
    """The best answer of each row; of equal ones the first."""
    best, place = reply.scores.float().max(dim=1)
    texts = getattr(reply, "texts", None)
    probability = best.sigmoid() if texts is None else reply.probability.float()  # pyright: ignore
    words = np.array(len(place) * [None] if texts is None else texts, dtype=object)
    return Replies(place.cpu().numpy(), probability.cpu().numpy(), reply.closed.float().cpu().numpy(), words)


def joined(replies: Sequence[Replies]) -> Replies:
    """All of them in one."""
    return Replies(*(np.concatenate(own) for own in zip(*replies, strict=True)))


class Pool:
    """Distinct images of a set, by name.

    Of more than `most` those stay whose names' digests are the least: a draw that does not depend on their order.

    Args:
        most: images held.
        seed: of the draw, and of who gets whose image.
    """

    def __init__(self, most: int = POOL, seed: int = 0) -> None:
        self.most = most
        self.seed = seed
        self.names: set[str] = set()  # of all images, held or not
        self._held: dict[bytes, tuple[str, Batch]] = {}
        self._last = b""  # the greatest digest that is held

    def see(self, name: str, batch: Batch, row: int) -> None:
        """Take the image of a row, unless it is there."""
        if name in self.names:
            return
        self.names.add(name)
        digest = self._digest(name)
        if len(self._held) >= self.most:
            if digest > self._last:
                return
            del self._held[self._last]
        self._held[digest] = (name, seen_rows(batch, [row]))
        self._last = max(self._held)

    @property
    def held(self) -> dict[str, Batch]:
        """Name -> batch of one row."""
        return {name: row for name, row in self._held.values()}

    def others(self) -> dict[str, str]:
        """Of every image another one that is held: a cyclic permutation of those held, so that none keeps its own.

        Empty where there is no other.
        """
        names = sorted(name for name, _ in self._held.values())
        if len(names) < 2:
            return {}
        order = [names[i] for i in np.random.default_rng(self.seed).permutation(len(names))]
        after = dict(zip(order, [*order[1:], order[0]], strict=True))
        return {n: after.get(n) or names[int.from_bytes(self._digest(n)) % len(names)] for n in self.names}

    def _digest(self, name: str) -> bytes:
        return blake2b(name.encode(), digest_size=8, key=str(self.seed).encode()).digest()


def rows_of(held: Mapping[str, Batch], names: Sequence[str]) -> Batch:
    """The rows of these images as one batch."""
    rows: list[Mapping[str, Any]] = [held[name] for name in names]
    tensors = {k: torch.cat([row[k] for row in rows]) for k, v in rows[0].items() if isinstance(v, Tensor)}
    return Batch(**tensors)  # type: ignore[typeddict-item]


def blank(batch: Batch, preprocess: Preprocess) -> Batch:
    """The batch with every image one grey: the mean brightness that it is normalised by."""
    assert "image" in batch
    mean = batch["mean"] if "mean" in batch else torch.tensor([preprocess.mean])
    grey = (255 * mean.mean(dim=1)).round().to(batch["image"].dtype)
    return Batch(**{**batch, "image": grey[:, None, None, None].expand_as(batch["image"]).contiguous()})  # type: ignore[typeddict-item]


def answers_about(
    model: Answerer,
    held: Mapping[str, Batch],
    names: Sequence[str],
    questions: Sequence[str],
    batch_size: int,
    *,
    without_image: bool = False,
) -> Replies:
    """Answers to question k about the image `names[k]` of `held`; `without_image` puts grey in its place.

    Raises:
        UserError: see `ask`.
    """
    found = []
    for start in range(0, len(questions), batch_size):
        part = slice(start, start + batch_size)
        seen = rows_of(held, names[part])
        found.append(read(ask(model, blank(seen, model.preprocess) if without_image else seen, questions[part])))
    return joined(found)


def words_of(tokenizer: Tokenizer, question: str) -> list[str]:
    """What a question's token positions stand for; "" for what has no word, such as padding."""
    decode = getattr(tokenizer, "decode", None)
    ids = tokenizer([question])[0].tolist()
    if decode is None:
        return [*question.split(), *len(ids) * [""]][: len(ids)]
    return [str(decode([i])).strip() for i in ids]
