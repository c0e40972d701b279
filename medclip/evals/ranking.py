"""Ranks for retrieval when images have several captions and several images share one.

Captions that are the same string are one item of the gallery: finding it is right for every image that bears it, and
copies of it cannot fill the first places. A query's rank is that of its best own item among the items not its own.
Ties count against the query (an item that scores as well as the best own one stands before it), so a collapsed model,
which scores everything alike, gets recall 0 and not chance.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK_CELLS = 1 << 24  # similarities held at once: 64 MiB of float32


def own_ranks(
    queries: Float[Tensor, "q d"],
    gallery: Float[Tensor, "g d"],
    own: Int[np.ndarray, "p 2"],
    chunk_cells: int = CHUNK_CELLS,
) -> Int[np.ndarray, " q"]:
    """Rank (1 = first) of each query's best own gallery item; `own` lists distinct (query, item) pairs.

    Memory is bounded by `chunk_cells` similarities whatever q and g. Every query must have an own item.
    """
    own = own[np.argsort(own[:, 0], kind="stable")]
    step = max(1, chunk_cells // max(1, len(gallery)))
    ranks = np.zeros(len(queries), dtype=np.int64)
    for start in range(0, len(queries), step):
        similarity = queries[start : start + step] @ gallery.T
        low, high = np.searchsorted(own[:, 0], [start, start + len(similarity)])
        query = torch.as_tensor(own[low:high, 0] - start, device=similarity.device)
        mine = similarity[query, torch.as_tensor(own[low:high, 1], device=similarity.device)]
        best = torch.full((len(similarity),), -torch.inf, dtype=mine.dtype, device=mine.device)
        best = best.scatter_reduce(0, query, mine, "amax")
        as_good = (similarity >= best[:, None]).sum(dim=1)
        as_good -= torch.zeros_like(as_good).index_add(0, query, (mine >= best[query]).long())
        ranks[start : start + len(similarity)] = 1 + as_good.cpu().numpy()
    return ranks


def best_items(
    query: Float[Tensor, " d"], gallery: Float[Tensor, "g d"], k: int
) -> tuple[Int[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """The k most similar gallery items and their cosines, best first."""
    found = (gallery @ query).topk(min(k, len(gallery)))
    return found.indices.cpu().numpy(), found.values.float().cpu().numpy()


def chance_recall(owned: Int[np.ndarray, " q"], gallery: int, k: int) -> float:
    """Recall@k of a random order: the mean over queries of 1 - C(g - own, k) / C(g, k)."""
    k = min(k, gallery)
    counts, times = np.unique(owned, return_counts=True)
    # C(g-own, k)/C(g, k) is the product over the first k places of the chance that each holds no own item.
    places = np.arange(k)
    missed = np.prod(np.clip((gallery - counts[:, None] - places) / (gallery - places), 0, None), axis=1)
    return float(1 - (missed * times).sum() / times.sum())


def chance_median_rank(owned: Int[np.ndarray, " q"], gallery: int) -> float:
    """The smallest rank that at least half of the queries reach under a random order."""
    low, high = 1, gallery
    while low < high:
        middle = (low + high) // 2
        if chance_recall(owned, gallery, middle) >= 0.5 - 1e-12:
            high = middle
        else:
            low = middle + 1
    return float(low)
