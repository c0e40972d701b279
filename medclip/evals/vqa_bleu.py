"""BLEU of short answers (Papineni et al. 2002), as a function of sample weights: `metrics` says why.

Of the whole corpus, not a mean over answers: most are of one word, and have no pair of words that could be right. The
counts are torchmetrics', sample by sample, so that unit weights give the value of its `BLEUScore(n_gram=n)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torchmetrics.text import BLEUScore

LONGEST = 4


@dataclass(frozen=True)
class BleuCounts:
    """Of each answer: its n-grams, those of them that a right answer has too, and in words its length and that of the
    right answer whose length is the closest."""

    shared: Float[np.ndarray, "n 4"]
    given: Float[np.ndarray, "n 4"]
    length: Float[np.ndarray, " n"]
    right_length: Float[np.ndarray, " n"]

    @classmethod
    def of(cls, given: Sequence[str], right: Sequence[tuple[str, ...]]) -> BleuCounts:
        """Of answers and the right ones, one or several a row."""
        counter = BLEUScore(n_gram=LONGEST)
        rows: dict[tuple[str, tuple[str, ...]], list[float]] = {}
        for pair in zip(given, right, strict=True):
            if pair not in rows:
                counter.reset()
                counter.update([pair[0]], [pair[1]])
                own = (counter.numerator, counter.denominator, counter.preds_len[None], counter.target_len[None])
                rows[pair] = [float(value) for part in own for value in part]
        table = np.array([rows[pair] for pair in zip(given, right, strict=True)]).reshape(-1, 2 * LONGEST + 2)
        return cls(table[:, :LONGEST], table[:, LONGEST:-2], table[:, -2], table[:, -1])

    def bleu(self, n: int, weights: Float[np.ndarray, "b n"]) -> Float[np.ndarray, " b"]:
        """BLEU-n under each row of weights; NaN where no right answer is of n words."""
        possible = weights @ (self.right_length >= n)
        shared, given = weights @ self.shared[:, :n], weights @ self.given[:, :n]
        length, right_length = weights @ self.length, weights @ self.right_length
        some = np.min(shared, axis=1) > 0
        precision = np.divide(shared, given, out=np.ones_like(shared), where=some[:, None])
        brevity = np.exp(np.minimum(0, 1 - np.divide(right_length, length, out=np.ones_like(length), where=some)))
        return np.where(possible > 0, some * brevity * np.exp(np.log(precision).mean(axis=1)), np.nan)
