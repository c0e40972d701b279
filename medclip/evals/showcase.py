"""Which samples of a classification are worth a look: the surest right ones, the surest wrong ones, and those of the
most frequent confusions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

EACH = 6  # samples of the surest
PAIRS, OF_PAIR = 3, 3  # confusions shown, and samples of each


@dataclass(frozen=True)
class Confused:
    """Samples of class `truth` that were taken for class `said`: how many, and the places of the surest of them."""

    truth: int
    said: int
    count: int
    places: list[int]


def surest(logits: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"], right: bool, most: int = EACH) -> list[int]:
    """Places of the samples whose first logit leads the second by most, among the right or the wrong ones.

    One a true class at a time, so that no easy class fills the row; among equals the earlier sample comes first.
    """
    among = np.flatnonzero((logits.argmax(axis=1) == labels) == right)
    ordered = among[np.argsort(-lead(logits)[among], kind="stable")]
    turn = np.array([(labels[ordered[:i]] == labels[ordered[i]]).sum() for i in range(len(ordered))], dtype=int)
    return ordered[np.argsort(turn, kind="stable")][:most].tolist()


def confusions(
    logits: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"], pairs: int = PAIRS, most: int = OF_PAIR
) -> list[Confused]:
    """The most frequent confusions, each with its surest samples; among equally frequent ones the earlier class."""
    said, leads = logits.argmax(axis=1), lead(logits)
    wrong = np.flatnonzero(said != labels)
    kinds, counts = np.unique(np.stack([labels[wrong], said[wrong]], axis=1), axis=0, return_counts=True)
    found = []
    for kind in np.argsort(-counts, kind="stable")[:pairs]:
        truth, guess = kinds[kind]
        own = wrong[(labels[wrong] == truth) & (said[wrong] == guess)]
        best = own[np.argsort(-leads[own], kind="stable")][:most]
        found.append(Confused(int(truth), int(guess), int(counts[kind]), best.tolist()))
    return found


def lead(logits: Float[np.ndarray, "n c"]) -> Float[np.ndarray, " n"]:
    """How far the largest logit of each row lies above the second; 0 where there is one class alone."""
    if logits.shape[1] < 2:
        return np.zeros(len(logits))
    two = np.partition(logits, -2, axis=1)[:, -2:]
    return two[:, 1] - two[:, 0]
