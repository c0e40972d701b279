"""Tip-Adapter: a few labelled images as a cache beside the prompts, without training (Zhang et al. 2022,
arXiv:2207.09519, equations 4 to 6).

    logits = 100 f W' + alpha exp(-beta (1 - f F')) L

with f the image's unit-norm feature, W the prompts' classifier, F the features of the shots and L their one-hot labels.
This is the training-free one: `Tip-Adapter-F`, which trains F, is not here. Features of shots are those of the images
as they are; the authors average them over ten random crops.

`alpha` and `beta` are chosen on held-out samples. The authors search beta from 0.1 to 7 and alpha from 0.1 to 3, or
either to 13 on small sets, in 200 and 20 steps; here both go to 13, in 20 steps each, and the cache may stay unused.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

ALPHAS = (0.0, *np.linspace(0.1, 13, 20))
BETAS = tuple(np.linspace(0.1, 13, 20))


@dataclass(frozen=True)
class Cache:
    """Unit-norm features and classes of the shots."""

    features: Float[np.ndarray, "m d"]
    labels: Int[np.ndarray, " m"]
    classes: int

    def distance(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n m"]:
        """1 - cosine to each shot."""
        return 1 - features @ self.features.T

    def votes(self, distance: Float[np.ndarray, "n m"], beta: float) -> Float[np.ndarray, "n c"]:
        """exp(-beta distance), summed over the shots of each class."""
        return np.exp(-beta * distance) @ np.eye(self.classes)[self.labels]


def tip_logits(
    features: Float[np.ndarray, "n d"], zero_shot: Float[np.ndarray, "n c"], cache: Cache, alpha: float, beta: float
) -> Float[np.ndarray, "n c"]:
    """Logits of images, given those by prompts alone (100 times the cosine)."""
    return zero_shot + alpha * cache.votes(cache.distance(features), beta)


def choose(
    features: Float[np.ndarray, "n d"],
    zero_shot: Float[np.ndarray, "n c"],
    labels: Int[np.ndarray, " n"],
    cache: Cache,
) -> tuple[float, float]:
    """(alpha, beta) of the highest balanced accuracy on held-out samples; of equal ones the smallest pair."""
    support = np.bincount(labels, minlength=cache.classes)
    each = 1 / (support[labels] * (support > 0).sum())  # so that the weights of right samples sum to the mean recall
    distance = cache.distance(features)
    scores = {}
    for beta in BETAS:
        votes = cache.votes(distance, beta)
        for alpha in ALPHAS:
            right = (zero_shot + alpha * votes).argmax(axis=1) == labels
            scores[float(alpha), float(beta)] = round(float(each[right].sum()), 12)
    return min(scores, key=lambda pair: (-scores[pair], pair))
