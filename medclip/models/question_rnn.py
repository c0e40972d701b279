"""Questions by word vectors and a GRU or an LSTM, as MEVF (arXiv:1909.11867) and QCR (Zhan et al. 2020) read them.

Two tables of vectors stand side by side: GloVe's, and its second one by neighbouring words (`word_vectors`); both are
trained. All 12 states are handed on, those after padding too, as published.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from medclip.models.question_words import QuestionTokenizer
from medclip.models.word_vectors import learned, neighbours, read_glove
from medclip.types import Asked, UserError

_CELLS = {"gru": nn.GRU, "lstm": nn.LSTM}


class QuestionRnn(nn.Module):
    """Word ids (b, length) -> `Asked` with states (b, length, hidden).

    Args:
        words: the words that have a vector.
        glove: text file of GloVe vectors; None: they are learned from random ones.
        texts: the training questions, which the second table is made from; None: it begins as the first.
        embedding: numbers of a vector.
        tables: 2, or 1 for the first alone.
        cell: "gru" or "lstm".
        hidden: numbers of a state.
        length: words that are read.
        compat: "paper": an unknown word is the last known one, and the second table has the published code's weights.

    Raises:
        UserError: a value out of range, or a file that does not fit.
    """

    def __init__(
        self,
        words: Sequence[str],
        *,
        glove: str | None = None,
        texts: Sequence[str] | None = None,
        embedding: int = 300,
        tables: Literal[1, 2] = 2,
        cell: Literal["gru", "lstm"] = "gru",
        hidden: int = 1024,
        length: int = 12,
        compat: str | None = None,
    ) -> None:
        super().__init__()
        if cell not in _CELLS:
            raise UserError(f"model.questions.cell is {cell!r}: choose gru or lstm")
        if tables not in (1, 2):
            raise UserError(f"model.questions.tables is {tables}: choose 1 or 2")
        if compat not in (None, "paper"):
            raise UserError(f"model.questions.compat is {compat!r}: say paper, or null")
        self.tokenizer = QuestionTokenizer(words, length, paper=compat == "paper")
        self.options: dict[str, Any] = {
            **{"embedding": embedding, "tables": tables, "cell": cell},
            **{"hidden": hidden, "length": length, "compat": compat},
        }
        first = read_glove(glove, words, embedding) if glove else learned(len(words), embedding)
        made = [first]
        if tables == 2:
            ids = map(self.tokenizer.encode, texts) if texts is not None else None
            made.append(first.clone() if ids is None else neighbours(ids, first, paper=compat == "paper"))
        self.tables = nn.ModuleList(self._table(vectors) for vectors in made)
        self.width = embedding * tables
        self.dim = hidden
        self.rnn = _CELLS[cell](self.width, hidden, batch_first=True)

    def _table(self, vectors: Float[Tensor, "words embedding"]) -> nn.Embedding:
        """A row a word, one for words that are not known (0 to begin with), one of zeros for padding."""
        table = nn.Embedding(self.tokenizer.padding + 1, vectors.shape[1], padding_idx=self.tokenizer.padding)
        with torch.no_grad():
            table.weight.zero_()
            table.weight[: len(vectors)] = vectors
        return table

    @property
    def description(self) -> dict[str, Any]:
        """Plain data from which `from_description` makes it again, without its weights."""
        return {"part": "models.question_rnn.QuestionRnn", "words": self.tokenizer.words, **self.options}

    @classmethod
    def from_description(cls, fields: Mapping[str, Any]) -> QuestionRnn:
        return cls(**fields)

    def another(self) -> QuestionRnn:
        """A GRU of its own over the first table alone, as QCR's other two encoders; it begins at the same vectors."""
        other = QuestionRnn(self.tokenizer.words, **self.options | {"tables": 1, "cell": "gru"})
        other.tables[0].load_state_dict(self.tables[0].state_dict())
        return other

    def forward(self, text: Int64[Tensor, "b q"]) -> Asked:
        embedded = torch.cat([table(text) for table in self.tables], -1)
        states, _ = self.rnn(embedded)
        return Asked(states, text != self.tokenizer.padding, embedded)
