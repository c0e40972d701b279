"""Questions to word ids of one length, by a list of words.

Texts come with a space between any two words, as the data module makes them. As in MEVF's and QCR's code: 12 words,
padded at the end. Ids 0 to n - 1 are the words; n is a word that is not in the list (as published it took the last
word's id); the last id is padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medclip.types import UserError


class QuestionTokenizer:
    """Texts to ids.

    Args:
        words: the known words, each once.
        context_length: words of a question that are read.
        paper: an unknown word is the last known one, as published.

    Raises:
        UserError: no word, or one twice.
    """

    def __init__(self, words: Sequence[str], context_length: int = 12, *, paper: bool = False) -> None:
        if not words:
            raise UserError("model.questions.words is empty: the training questions have no words")
        self.words = list(words)
        self.context_length = context_length
        self._ids = {word: i for i, word in enumerate(self.words)}
        if len(self._ids) < len(self.words):
            raise UserError("model.questions.words has a word twice: name each once")
        self.unknown = len(words) - 1 if paper else len(words)
        self.padding = len(words) + (not paper)

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """Texts -> int64 (n, context_length)."""
        texts = [texts] if isinstance(texts, str) else texts
        ids = torch.full((len(texts), self.context_length), self.padding, dtype=torch.int64)
        for row, text in zip(ids, texts, strict=True):
            found = self.encode(text)[: self.context_length]
            row[: len(found)] = torch.tensor(found, dtype=torch.int64)
        return ids

    def encode(self, text: str) -> list[int]:
        """The ids of all words of `text`."""
        return [self._ids.get(word, self.unknown) for word in text.lower().split()]

    def decode(self, ids: Sequence[int]) -> str:
        """The words that a row of ids stands for: what the model reads."""
        return " ".join(self.words[i] if i < len(self.words) else "?" for i in ids if i != self.padding)
