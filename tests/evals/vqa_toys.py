"""Squares of a colour in a quarter of the picture, questions about them, and models whose answers are known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from medclip.types import Batch, Preprocess
from tests.evals.eval_toys import COLOURS

ANSWERS = ["closed: yes", "closed: no", "open: red", "open: green", "open: blue", "open: top left"]
WORDS = ["is", "it", "red", "green", "blue", "which", "colour", "where"]
NAMES = list(COLOURS)
SIDE = 32


class Row(NamedTuple):
    """A question: the image's name, its colour and quarter, and what is asked."""

    image: str
    colour: str
    question: str
    answer: str
    type: str
    kind: str = ""
    organ: str = ""


def rows(images: int = 6, seed: int = 0) -> list[Row]:
    """Of each image: its colour, and one closed question whose answer is yes and no in turn."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(images):
        colour = NAMES[i % 3]
        asked = colour if i // 3 % 2 == 0 else NAMES[(i + 1 + int(rng.integers(2))) % 3]
        organ = "head" if i % 2 else "chest"
        answer = "yes" if asked == colour else "no"
        found.append(Row(f"im-{i}", colour, "which colour", colour, "open", "colour", organ))
        found.append(Row(f"im-{i}", colour, f"is it {asked}", answer, "closed", "colour, check", organ))
    return found


class QuestionSet:
    """`EvalSet`'s interface: rows in their order, batches padded to full size, one sample that could not be read."""

    def __init__(self, asked: Sequence[Row | None]) -> None:
        self.rows = list(asked)
        self.bad: list[tuple[str, str, str]] = [("x", "broken image", "cut short")]

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, preprocess: Preprocess, batch_size: int, workers: int) -> Iterator[Batch]:
        for start in range(0, len(self.rows), batch_size):
            part = self.rows[start : start + batch_size]
            images = torch.zeros(batch_size, 3, SIDE, SIDE, dtype=torch.uint8)
            metas: list[dict[str, Any]] = []
            for i, row in enumerate(part):
                about = None
                if row is not None:
                    images[i] = 20
                    images[i, :, : SIDE // 2, : SIDE // 2] = torch.tensor(COLOURS[row.colour])[:, None, None]
                    about = {"id": f"q{start + i}", "slot": f"{row.type}: {row.answer}", **row._asdict()}
                raw = {} if about is None else {"vqa": about}
                group = "none" if row is None else row.image
                metas.append({"label": None, "captions": [], "group": group, "raw": raw})
            yield Batch(image=images, key=[f"k{start + i}" for i in range(len(part))], meta=metas)


class QuestionTokens:
    """Word numbers; the number of words is padding, one more is a word that is not known."""

    context_length = 6

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        texts = [texts] if isinstance(texts, str) else texts
        ids = torch.full((len(texts), self.context_length), len(WORDS), dtype=torch.long)
        for row, text in zip(ids, texts, strict=True):
            for place, word in enumerate(text.split()[: self.context_length]):
                row[place] = WORDS.index(word) if word in WORDS else len(WORDS) + 1
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(WORDS[i] if i < len(WORDS) else "?" for i in ids if i != len(WORDS))


class Reply(NamedTuple):
    scores: Tensor
    closed: Tensor
    attention: Tensor


class ColourVqa(nn.Module):
    """Reads the colour of the upper left quarter and the question.

    Args:
        looks: else it takes every picture for a red one.
        reads: else it takes every question for "is it red".
        routes: tells the type by its first word, and rules out the other one's answers; a set of questions: of these
            it tells the wrong type.
        answers: that it can give.
        objects: of its attention, cells of a grid; it looks at the upper left one and at the last word.
    """

    def __init__(
        self,
        *,
        looks: bool = True,
        reads: bool = True,
        routes: bool | set[str] = False,
        answers: Sequence[str] = ANSWERS,
        objects: int = 16,
    ) -> None:
        super().__init__()
        self.looks, self.reads, self.routes, self.objects = looks, reads, routes, objects
        self.answers = list(answers)
        self.description = {"kind": "vqa", "answers": self.answers}
        self.preprocess = Preprocess(size=(SIDE, SIDE), mean=(0.5, 0.5, 0.5))
        self.tokenizer = QuestionTokens()
        self.register_buffer("here", torch.zeros(()))
        self.seen: list[Tensor] = []

    @property
    def device(self) -> torch.device:
        return self.here.device  # type: ignore[return-value]

    def forward(self, batch: Batch) -> Tensor:
        return self.answer(batch).scores

    def answer(self, batch: Batch) -> Reply:
        assert "image" in batch and "text" in batch
        image, text = batch["image"], batch["text"]
        self.seen.append(image)
        corner = image[:, :, : SIDE // 2, : SIDE // 2].float().mean(dim=(2, 3))
        palette = torch.tensor(list(COLOURS.values())).float()
        colour = torch.cdist(corner, palette).argmin(dim=1) if self.looks else torch.zeros(len(image)).long()
        scores = torch.full((len(text), len(self.answers)), -3.0)
        told = torch.full((len(text),), torch.nan)
        attention = torch.zeros(len(text), 2, self.objects, text.shape[1])
        for i, ids in enumerate(text.tolist()):
            words = self.tokenizer.decode(ids).split() if self.reads else ["is", "it", "red"]
            seen = NAMES[int(colour[i])]
            answer = seen if words[0] == "which" else "yes" if words[-1] == seen else "no"
            for place, name in enumerate(self.answers):
                if name.rpartition(": ")[2] == answer:
                    scores[i, place] = 2.0
            if self.routes:
                closed = words[0] == "is"
                if isinstance(self.routes, set) and " ".join(words) in self.routes:
                    closed = not closed
                told[i] = 0.9 if closed else 0.1
                own = torch.tensor([name.startswith("closed: ") == closed for name in self.answers])
                scores[i] = scores[i].masked_fill(~own, -torch.inf)
            attention[i, 0, 0, min(len(words), text.shape[1]) - 1] = 1
            attention[i, 1] = 1 / attention[i, 1].numel()
        return Reply(scores, told, attention)


def load_colour_vqa(pretrained: str) -> ColourVqa:
    """`conf/evaluate.yaml`'s `load`: looks, blind or routes."""
    return ColourVqa(looks=pretrained != "blind", routes=pretrained == "routes")
