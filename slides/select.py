"""Representative patches of a slide, chosen on embeddings: PathGen's three ways, then without near-duplicates.

Sun et al., "PathGen-1.6M", arXiv:2407.00203, section 3.1 and its published script:
  attributes  score of a patch = the MAXIMUM over the attribute prompts of 100 cos; the 64 best
  findings    score of a patch = the SUM over the report's findings of 100 cos; the 64 best
  clusters    k-means on unit features, k = ceil(sqrt(1.6 n)); max(1, floor(256 / k)) at random from each, 256 at most
Their union, best rank first, loses each patch whose cosine to one that stays is 0.88 or more.

Differences: the script's n is the number of batches of 128, the paper's of patches (`batch=128` gives the script's).
The order in which duplicates give way is ours (the paper does not say). Prompts are an argument of each call, where the
script's list grows from slide to slide. Features and prompts come from any model, this file knows none. Cosines are
taken in float64 and count to six decimals, so that no answer depends on how many rows are multiplied at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from sklearn.cluster import KMeans, MiniBatchKMeans

from slides.errors import SlideError

WAYS = ("attributes", "findings", "clusters")
_DECIMALS = 6
_BLOCK = 1024  # rows at a time: of 1024 numbers each, 8 MB of float64
_STARTS = 5  # of k-means, the best is taken: of one start, 1 in 15 put two rare textures into one cluster
_MANY = 20_000  # patches, beyond which k-means goes in mini-batches


@dataclass(frozen=True, eq=False)
class Selection:
    """The chosen patches, m of n, best rank first; one row of each array a patch.

    Args:
        index: (m,) int64, row of the features.
        ways: (m, 3) bool, by which of `WAYS` it was chosen.
        rank: (m,) int64, its best place in any of them, from 0.
        attribute: (m,) float64, maximum of 100 cos over the attribute prompts; NaN without prompts.
        finding: (m,) float64, sum of 100 cos over the findings; NaN without findings.
        cluster: (m,) int64, its k-means cluster; -1 where none were asked for.
    """

    index: np.ndarray
    ways: np.ndarray
    rank: np.ndarray
    attribute: np.ndarray
    finding: np.ndarray
    cluster: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def ways_of(self, row: int) -> tuple[str, ...]:
        """The names of the ways that chose row `row` of the selection."""
        return tuple(way for way, chosen in zip(WAYS, self.ways[row], strict=True) if chosen)


def select(
    features: np.ndarray,
    attributes: np.ndarray | None = None,
    findings: np.ndarray | None = None,
    *,
    top: int = 64,
    budget: int = 256,
    ratio: float = 1.6,
    batch: int = 1,
    threshold: float | None = 0.88,
    group: np.ndarray | None = None,
    seed: int = 0,
) -> Selection:
    """The representative patches of one slide.

    To drop duplicates over several slides (of a patient, say), call it a slide with `threshold=None` and then
    `deduplicate` over all that was chosen.

    Args:
        features: (n, d), an embedding a patch; of any length, not 0.
        attributes: (a, d), embeddings of attribute prompts; none or None to leave that way out.
        findings: (f, d), embeddings of the findings in this slide's report; likewise.
        top: how many patches each kind of prompt chooses.
        budget: how many patches the clusters choose at most; 0 to leave that way out.
        ratio: 1.6 of the number of clusters.
        batch: patches that count as one for the number of clusters.
        threshold: cosine from which on two patches are the same; None to keep all.
        group: (n,), labels: only patches of one group are compared; None to compare all.
        seed: of k-means and of the draw from its clusters.

    Raises:
        SlideError: shapes do not match, a row is 0 or not finite, or a number is out of range.
    """
    features = _rows(features, "features")
    n = len(features)
    if top < 0 or budget < 0:
        raise SlideError(f"select: top is {top}, budget {budget}: give numbers from 0")
    none = np.zeros(0, np.int64)
    attribute, finding = np.full(n, np.nan), np.full(n, np.nan)
    best_attribute = best_finding = drawn = none
    if attributes is not None and len(attributes):
        attribute = attribute_scores(features, attributes)
        best_attribute = np.argsort(-attribute, kind="stable")[:top]
    if findings is not None and len(findings):
        finding = finding_scores(features, findings)
        best_finding = np.argsort(-finding, kind="stable")[:top]
    labels = np.full(n, -1)
    if budget and n:
        labels = cluster(features, cluster_count(n, ratio, batch), seed)
        drawn = draw(labels, budget, np.random.default_rng(seed))

    places = np.full((n, len(WAYS)), n)
    for way, chosen in enumerate((best_attribute, best_finding, drawn)):
        places[chosen, way] = np.arange(len(chosen))
    rank = places.min(1, initial=n)
    # Of equal rank, attributes go before findings before clusters; one way gives a rank once.
    order = np.lexsort((places.argmin(1), rank))[: int((rank < n).sum())]
    if threshold is not None:
        order = deduplicate(features, order, threshold=threshold, group=group)
    return Selection(order, places[order] < n, rank[order], attribute[order], finding[order], labels[order])


def attribute_scores(features: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """Maximum over the prompts of 100 cos, (n,); of (n, d) and (a, d).

    Raises:
        SlideError: shapes do not match, or a row is 0 or not finite.
    """
    return _scores(features, prompts, "attributes", lambda cosines: cosines.max(1))


def finding_scores(features: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """Sum over the findings of 100 cos, (n,); of (n, d) and (f, d).

    Raises:
        SlideError: shapes do not match, or a row is 0 or not finite.
    """
    return _scores(features, prompts, "findings", lambda cosines: cosines.sum(1))


def cluster_count(n: int, ratio: float = 1.6, batch: int = 1) -> int:
    """k = ceil(sqrt(ratio * n)), n counting patches or batches of them; at most as many as there are patches."""
    if ratio <= 0 or batch < 1:
        raise SlideError(f"select: ratio is {ratio}, batch {batch}: give a ratio above 0, and a batch from 1")
    return min(n, math.ceil(round(math.sqrt(ratio * math.ceil(n / batch)), 9)))


def cluster(features: np.ndarray, k: int, seed: int) -> np.ndarray:
    """k-means labels, (n,) int64, of features (n, d) brought to length 1; in mini-batches from 20,000 patches on."""
    unit = np.concatenate([block.astype(np.float32) for block in _unit_blocks(features)])
    if len(unit) < _MANY:
        means = KMeans(k, n_init=_STARTS, random_state=seed)  # pyright: ignore[reportArgumentType]
    else:
        means = MiniBatchKMeans(k, n_init=_STARTS, batch_size=4096, random_state=seed)  # pyright: ignore[reportArgumentType]
    return means.fit_predict(unit).astype(np.int64)


def draw(labels: np.ndarray, budget: int, rng: np.random.Generator) -> np.ndarray:
    """Rows drawn from each cluster in turn, max(1, floor(budget / clusters)) of them or all; `budget` rows at most.

    Args:
        labels: (n,), the cluster of each row.
        budget: rows at most.
        rng: draws them.
    """
    order = np.argsort(labels, kind="stable")
    clusters = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    each = max(1, budget // len(clusters))
    drawn = [rng.choice(members, min(each, len(members)), replace=False) for members in clusters]
    return np.concatenate(drawn)[:budget]


def deduplicate(
    features: np.ndarray,
    order: np.ndarray | None = None,
    *,
    threshold: float = 0.88,
    group: np.ndarray | None = None,
    block: int = _BLOCK,
) -> np.ndarray:
    """Rows that stay when each gives way to an earlier one that stays and is `threshold` or more like it.

    Args:
        features: (n, d).
        order: (m,), rows to look at, the one to prefer first; None for all as they lie.
        threshold: cosine from which on two rows are the same.
        group: (n,), labels of slides or patients: only rows of one group are compared. None compares all.
        block: rows at a time. Memory goes with it and with what stays; the answer does not.

    Returns:
        Those of `order` that stay, in its order.

    Raises:
        SlideError: shapes do not match, a row is 0 or not finite, or the threshold is no cosine.
    """
    features = _rows(features, "features")
    if not -1 <= threshold <= 1:
        raise SlideError(f"select: threshold is {threshold}, a cosine from -1 to 1 (usually 0.88)")
    order = np.arange(len(features)) if order is None else np.asarray(order)
    if group is None:
        return order[_stay(features, order, threshold, block)]
    if len(group) != len(features):
        raise SlideError(f"select: {len(group)} group labels for {len(features)} features: give one a patch")
    _, of_group = np.unique(np.asarray(group)[order], return_inverse=True)
    by_group = np.argsort(of_group, kind="stable")
    stay = np.zeros(len(order), bool)
    for members in np.split(by_group, np.flatnonzero(np.diff(of_group[by_group])) + 1):
        stay[members] = _stay(features, order[members], threshold, block)
    return order[stay]


def _stay(features: np.ndarray, order: np.ndarray, threshold: float, block: int) -> np.ndarray:
    stay = np.zeros(len(order), bool)
    kept: list[np.ndarray] = []
    for start in range(0, len(order), block):
        (rows,) = _unit_blocks(features[order[start : start + block]], block)
        new = np.ones(len(rows), bool)
        for earlier in kept:
            new[new] = ~_alike(rows[new], earlier, threshold).any(1)
        same = _alike(rows[new], rows[new], threshold)
        among = np.ones(len(same), bool)
        for i in range(len(same)):
            if among[i]:
                among[i + 1 :] &= ~same[i, i + 1 :]
        new[new] = among
        stay[start : start + block] = new
        kept.append(rows[new])
    return stay


def _alike(a: np.ndarray, b: np.ndarray, threshold: float) -> np.ndarray:
    return np.round(a @ b.T, _DECIMALS) >= round(threshold, _DECIMALS)


def _scores(
    features: np.ndarray, prompts: np.ndarray, name: str, reduce: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    features = _rows(features, "features")
    prompts = _rows(prompts, name, features.shape[1])
    unit = np.concatenate(list(_unit_blocks(prompts)))
    scores = [reduce(100 * block @ unit.T) for block in _unit_blocks(features)]
    return np.round(np.concatenate(scores), _DECIMALS) if scores else np.zeros(0)


def _unit_blocks(features: np.ndarray, size: int = _BLOCK) -> Iterator[np.ndarray]:
    """Rows of length 1 in float64, `size` at a time."""
    for start in range(0, len(features), size):
        block = features[start : start + size].astype(np.float64)
        yield block / np.linalg.norm(block, axis=1, keepdims=True)


def _rows(features: np.ndarray, name: str, width: int | None = None) -> np.ndarray:
    features = np.asarray(features)
    if features.ndim != 2 or (width is not None and features.shape[1] != width):
        wanted = "(n, d)" if width is None else f"(n, {width}), as the features have"
        raise SlideError(f"select: {name} of shape {features.shape}: give {wanted}")
    for start in range(0, len(features), _BLOCK):
        lengths = np.linalg.norm(features[start : start + _BLOCK].astype(np.float64), axis=1)
        bad = np.flatnonzero(~((lengths > 0) & np.isfinite(lengths)))
        if len(bad):
            raise SlideError(f"select: row {start + bad[0]} of {name} is 0 or not finite: leave such rows out")
    return features
