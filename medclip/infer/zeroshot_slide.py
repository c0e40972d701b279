"""Zero-shot classification of slides by their patches (MI-Zero: Lu et al. 2023, CVPR, arXiv 2306.07831).

Every patch of a slide is held against every class's prompt, which gives scores (n, c) of cosines. A class's score of
the slide is the mean of its k highest ones ("top-k pooling"), each class by its own patches; with k as large as the
slide it is the mean over all patches. Scores may be smoothed over each patch's neighbours first.

How words are chosen moves such scores as much as models do, so the paper draws prompts: one name of each class and a
subset of the templates at random, fifty times, and reports the median.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.spatial import KDTree
from torch import Tensor

from medclip.types import UserError

_ROWS = 65536  # patches whose scores are made at once


@dataclass(frozen=True)
class Drawn:
    """One draw of prompts: the place of each class's name, and the places of the templates."""

    names: tuple[int, ...]
    templates: tuple[int, ...]


def check_features(meta: Mapping[str, Any], slide: str, weights: str, width: int, dim: int, trust: str | None) -> None:
    """Refuse features that texts of this checkpoint cannot be compared with.

    Args:
        meta: of the slide: `encoder` and `weights` of its features.
        slide: its name.
        weights: fingerprint of the checkpoint.
        width: of the features.
        dim: of the checkpoint's texts.
        trust: an encoder's name: features of that name are taken as the checkpoint's where no weights are named.

    Raises:
        UserError: they are of another model, do not say whose they are, or have another width.
    """
    own, name = str(meta.get("weights") or ""), str(meta.get("encoder") or "")
    if own and own != weights:
        raise UserError(
            f"slide {slide}: its features were made by other weights ({name or 'no name'}, {own}) than this "
            f"checkpoint's ({weights}): extract them with encoder=clip encoder.checkpoint=THIS, or evaluate theirs"
        )
    if not own and (trust is None or name != trust):
        raise UserError(
            f"slide {slide}: its features ({name or 'no name'}) do not say which weights made them: extract them anew, "
            f"or say encoder={name or 'NAME'} in the evaluation if they are this checkpoint's"
        )
    if width != dim:
        raise UserError(f"slide {slide}: its features are {width} wide, this checkpoint's texts {dim}: another model's")


def patch_scores(features: Float[Tensor, "n d"], texts: Float[Tensor, "c d"]) -> Float[np.ndarray, "n c"]:
    """Cosines of patches and texts, float32; features of any length, texts unit-norm. A patch of zeros scores 0."""
    rows = [torch.nn.functional.normalize(part.float(), dim=-1) @ texts.float().T for part in features.split(_ROWS)]
    return torch.cat(rows).cpu().numpy()


def pool(scores: Float[np.ndarray, "n c"], k: int | None) -> Float[np.ndarray, " c"]:
    """The mean of each column's k highest values; of all where k is None or there are fewer.

    The paper sums them; over the same number of patches for every class that orders classes alike.
    """
    if k is None or k >= len(scores):
        return scores.mean(axis=0, dtype=np.float64)
    return np.partition(scores, len(scores) - k, axis=0)[-k:].mean(axis=0, dtype=np.float64)


def neighbours(coords: Int[np.ndarray, "n 2"], k: int) -> Int[np.ndarray, "n m"]:
    """Each patch and the k nearest others by their corners; all there are where there are fewer."""
    found = KDTree(coords).query(coords, k=min(k + 1, len(coords)))[1]
    return np.asarray(found).reshape(len(coords), -1)


def smooth(scores: Float[np.ndarray, "n c"], near: Int[np.ndarray, "n m"]) -> Float[np.ndarray, "n c"]:
    """The mean over each patch's `neighbours` (spatial smoothing)."""
    total = np.zeros(scores.shape, np.float64)
    for column in near.T:
        total += scores[column]
    return total / near.shape[1]


def draw_prompts(sizes: Sequence[int], templates: int, draws: int, seed: int) -> list[Drawn]:
    """Random choices of words, as the paper makes them: a name of each class, and a subset of the templates.

    Args:
        sizes: names of each class.
        templates: how many there are; the subset's size is drawn evenly from 1 to all.
        draws: how many choices.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        names = tuple(int(rng.integers(size)) for size in sizes)
        subset = rng.choice(templates, size=int(rng.integers(1, templates + 1)), replace=False)
        found.append(Drawn(names, tuple(sorted(map(int, subset)))))
    return found


def drawn_classifier(prompts: Sequence[Float[Tensor, "t names d"]], drawn: Drawn) -> Float[Tensor, "c d"]:
    """A draw's classifier: of each class the renormalised mean over the draw's templates of its name."""
    rows = [own[list(drawn.templates), name].mean(dim=0) for own, name in zip(prompts, drawn.names, strict=True)]
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1)
