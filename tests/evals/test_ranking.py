"""Retrieval ranks against a brute-force reading of their definition, and chance against shuffling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.functional.retrieval import retrieval_hit_rate

from medclip.evals.ranking import best_items, chance_median_rank, chance_recall, own_ranks


def features(n: int, d: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=1)


@pytest.mark.parametrize("chunk_cells", [1, 100, 1 << 20])
def test_ranks_by_brute_force(chunk_cells: int) -> None:
    images, texts = features(20, 6, 0), features(33, 6, 1)
    rng = np.random.default_rng(2)
    own = np.unique([(i, t) for i in range(20) for t in rng.choice(33, rng.integers(1, 4), replace=False)], axis=0)
    got = own_ranks(images, texts, rng.permutation(own), chunk_cells)
    for i in range(20):
        mine = set(own[own[:, 0] == i, 1])
        order = [int(t) for t in torch.argsort(-(texts @ images[i]))]
        best = min(order.index(t) for t in mine)
        assert got[i] == best + 1  # everything before the best own item is not own


@pytest.mark.parametrize("k", [1, 5, 10])
def test_recall_equals_torchmetrics_hit_rate(k: int) -> None:
    images, texts = features(25, 8, 3), features(50, 8, 4)
    own = np.array([(i, t) for i in range(25) for t in (2 * i, 2 * i + 1)])
    ranks = own_ranks(images, texts, own)
    relevant = torch.zeros(25, 50, dtype=torch.bool)
    relevant[own[:, 0], own[:, 1]] = True
    want = [retrieval_hit_rate(texts @ images[i], relevant[i], top_k=k) for i in range(25)]
    assert (ranks <= k).mean() == pytest.approx(float(torch.stack(want).mean()))


def test_ties_count_against_the_query() -> None:
    collapsed = torch.ones(4, 2) / 2**0.5
    assert own_ranks(collapsed, collapsed, np.array([(i, i) for i in range(4)])).tolist() == [4, 4, 4, 4]


def test_own_items_never_push_each_other_back() -> None:
    gallery = torch.eye(3)
    query = torch.tensor([[0.6, 0.6, 0.5]])
    assert own_ranks(query, gallery, np.array([(0, 0), (0, 1)])).tolist() == [1]
    assert own_ranks(query, gallery, np.array([(0, 2)])).tolist() == [3]


def test_best_items() -> None:
    found, scores = best_items(torch.tensor([0.0, 1.0]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]), 2)
    assert found.tolist() == [1, 2]
    np.testing.assert_allclose(scores, [1.0, 0.8])


def test_chance_is_what_shuffling_gives() -> None:
    rng = np.random.default_rng(6)
    owned, size = np.array([1, 2, 3, 5]), 20
    first = np.array([[rng.permutation(size)[:o].min() + 1 for o in owned] for _ in range(20_000)])
    for k in (1, 5, 10):
        assert chance_recall(owned, size, k) == pytest.approx((first <= k).mean(), abs=0.008)
    assert abs(chance_median_rank(owned, size) - np.median(first)) <= 1


def test_chance_by_hand() -> None:
    assert chance_recall(np.ones(7, dtype=int), 100, 10) == pytest.approx(0.1)
    assert chance_recall(np.array([2]), 4, 1) == pytest.approx(0.5)
    assert chance_recall(np.array([1]), 3, 10) == pytest.approx(1.0)
    assert chance_median_rank(np.ones(3, dtype=int), 100) == 50
