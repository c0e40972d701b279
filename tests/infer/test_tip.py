"""Tip-Adapter against its formula, and the choice of alpha and beta by exhaustion."""

from __future__ import annotations

from math import exp

import numpy as np
import pytest

from medclip.infer.tip import ALPHAS, BETAS, Cache, choose, tip_logits


def unit(rng: np.random.Generator, n: int, d: int = 6) -> np.ndarray:
    rows = rng.normal(size=(n, d))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_logits_are_the_papers_formula() -> None:
    rng = np.random.default_rng(0)
    f, shots, w, labels = unit(rng, 4), unit(rng, 5), unit(rng, 3), np.array([0, 2, 2, 1, 0])
    alpha, beta = 1.7, 4.2
    found = tip_logits(f, 100 * f @ w.T, Cache(shots, labels, 3), alpha, beta)
    for n in range(4):
        for c in range(3):
            votes = sum(exp(-beta * (1 - f[n] @ shots[m])) for m in range(5) if labels[m] == c)
            assert found[n, c] == pytest.approx(100 * f[n] @ w[c] + alpha * votes, abs=1e-12)


def test_an_unused_cache_leaves_the_prompts_and_a_sharp_one_is_the_nearest_shot() -> None:
    rng = np.random.default_rng(1)
    f, shots, labels = unit(rng, 50), unit(rng, 9), np.arange(9) % 3
    prompts, cache = rng.normal(size=(50, 3)), Cache(shots, labels, 3)
    np.testing.assert_array_equal(tip_logits(f, prompts, cache, 0.0, 3.0), prompts)
    nearest = labels[(f @ shots.T).argmax(axis=1)]
    np.testing.assert_array_equal(tip_logits(f, 0 * prompts, cache, 1.0, 500.0).argmax(axis=1), nearest)


def test_the_chosen_pair_is_the_best_of_all_and_the_cache_stays_unused_where_it_cannot_help() -> None:
    rng = np.random.default_rng(2)
    centres = unit(rng, 3)
    labels = np.array([0] * 20 + [1] * 5 + [2] * 9)
    f = centres[labels] + 0.5 * rng.normal(size=(34, 6))
    f /= np.linalg.norm(f, axis=1, keepdims=True)
    cache = Cache(centres, np.arange(3), 3)
    poor = 3 * rng.normal(size=(34, 3))

    def balanced(alpha: float, beta: float) -> float:
        right = tip_logits(f, poor, cache, alpha, beta).argmax(axis=1) == labels
        return float(np.mean([right[labels == c].mean() for c in range(3)]))

    found = choose(f, poor, labels, cache)
    assert balanced(*found) == pytest.approx(max(balanced(a, b) for a in ALPHAS for b in BETAS), abs=1e-12)
    assert balanced(*found) > balanced(0, 1) + 0.1
    assert choose(f, 50.0 * np.eye(3)[labels], labels, cache) == (0.0, pytest.approx(0.1))
