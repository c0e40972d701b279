"""PathGen's selection: scores by hand, duplicates by brute force, rare textures found where chance misses them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score
from sklearn.metrics.pairwise import cosine_similarity

from slides.errors import SlideError
from slides.select import (
    WAYS,
    attribute_scores,
    cluster,
    cluster_count,
    deduplicate,
    draw,
    finding_scores,
    select,
)


def vectors(n: int, d: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def turned(degrees: object) -> np.ndarray:
    """Unit vectors of the plane at these angles: their cosines are those of the differences."""
    radians = np.radians(np.atleast_1d(np.asarray(degrees, np.float64)))
    return np.stack([np.cos(radians), np.sin(radians)], 1)


def test_scores_of_three_patches_by_hand() -> None:
    # Patches along x, y and at 45 degrees; 20 attribute prompts, one of them along x; two findings, along x and y.
    patches = np.array([[2.0, 0, 0], [0, 5.0, 0], [1.0, 1.0, 0]])
    attributes = np.tile([[0.0, 0.0, 1.0]], (20, 1))
    attributes[13] = [3.0, 0, 0]
    findings = np.array([[1.0, 0, 0], [0, 7.0, 0]])
    half = 100 / np.sqrt(2)
    assert np.allclose(attribute_scores(patches, attributes), [100, 0, half])
    assert np.allclose(finding_scores(patches, findings), [100, 100, 2 * half])
    # Maximum and sum choose differently here: best for the findings is the patch that fits both of them somewhat.
    assert select(patches, attributes, top=1, budget=0).index.tolist() == [0]
    assert select(patches, None, findings, top=1, budget=0).index.tolist() == [2]


@given(st.integers(1, 50), st.integers(1, 9), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_scores_are_scikit_learns_cosines(n: int, m: int, seed: int) -> None:
    features, prompts = vectors(n, seed=seed), vectors(m, seed=seed + 1)
    cosines = 100 * cosine_similarity(features.astype(float), prompts.astype(float))
    assert np.allclose(attribute_scores(features, prompts), cosines.max(1), atol=1e-6)
    assert np.allclose(finding_scores(features, prompts), cosines.sum(1), atol=1e-6)


def test_scores_of_more_rows_than_a_block() -> None:
    features, prompts = vectors(2500), vectors(3, seed=1)
    parts = [finding_scores(features[k : k + 700], prompts) for k in range(0, 2500, 700)]
    assert (finding_scores(features, prompts) == np.concatenate(parts)).all()


def test_prompts_do_not_grow_from_slide_to_slide() -> None:
    # The published script appends each slide's findings to one list; here a slide's answer is its own.
    first, second, prompts = vectors(200, seed=1), vectors(200, seed=2), vectors(20, seed=3)
    findings = vectors(4, seed=4), vectors(3, seed=5)
    for array in (first, second, prompts, *findings):
        array.flags.writeable = False
    alone = select(second, prompts, findings[1])
    select(first, prompts, findings[0])
    after = select(second, prompts, findings[1])
    assert (alone.index == after.index).all() and (alone.finding == after.finding).all()
    # And it would differ had they grown.
    grown = select(second, prompts, np.concatenate(findings))
    assert not np.allclose(np.sort(grown.finding), np.sort(alone.finding))


@pytest.mark.parametrize(
    ("n", "k"), [(1000, 40), (1, 1), (2, 2), (10, 4), (360, 24), (361, 25), (40_000, 253), (200_000, 566)]
)
def test_number_of_clusters(n: int, k: int) -> None:
    assert cluster_count(n) == k


def test_number_of_clusters_by_batches_is_the_scripts() -> None:
    assert cluster_count(12_800, batch=128) == 13  # 100 batches: ceil(sqrt(160))
    assert cluster_count(12_801, batch=128) == 13 and cluster_count(129, batch=128) == 2
    assert cluster_count(3, ratio=100.0) == 3  # no more than patches


@given(st.integers(1, 2000), st.integers(1, 300), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_a_draw_keeps_to_its_quota_and_budget(n: int, budget: int, seed: int) -> None:
    labels = np.random.default_rng(seed).geometric(0.1, n) * 7
    drawn = draw(labels, budget, np.random.default_rng(seed))
    names, sizes = np.unique(labels, return_counts=True)
    each = max(1, budget // len(names))
    assert len(set(drawn.tolist())) == len(drawn) == min(budget, int(np.minimum(sizes, each).sum()))
    assert max(np.unique(labels[drawn], return_counts=True)[1]) <= each
    if len(names) <= budget:
        assert set(labels[drawn]) == set(names)


def test_a_draw_is_even_within_a_cluster() -> None:
    counts = np.zeros(10)
    rng = np.random.default_rng(0)
    for _ in range(2000):
        counts[draw(np.zeros(10, int), 3, rng)] += 1
    assert np.abs(counts / 600 - 1).max() < 0.2  # 600 expected, standard deviation 20


def test_clusters_that_lie_apart_are_found_whatever_the_length_of_features() -> None:
    truth = np.repeat(np.arange(5), 60)
    centres = 10 * np.eye(5, 16)
    features = (centres[truth] + vectors(300, 16)) * np.random.default_rng(0).uniform(0.1, 10, (300, 1))
    assert adjusted_rand_score(truth, cluster(features, 5, seed=0)) == 1.0


def test_many_patches_are_clustered_in_mini_batches_as_well() -> None:
    truth = np.arange(20_000) % 4
    features = (10 * np.eye(4, 8))[truth] + vectors(20_000, 8)
    assert adjusted_rand_score(truth, cluster(features, 4, seed=0)) > 0.99


def greedy(features: np.ndarray, order: np.ndarray, threshold: float, group: np.ndarray) -> list[int]:
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    kept: list[int] = []
    for i in order.tolist():
        if all(group[i] != group[j] or unit[i] @ unit[j] < threshold for j in kept):
            kept.append(i)
    return kept


@given(st.integers(1, 120), st.integers(1, 60), st.floats(0.3, 0.99), st.integers(1, 5), st.integers(0, 10**6))
@settings(max_examples=80, deadline=None)
def test_duplicates_are_dropped_as_by_brute_force_whatever_the_block(
    n: int, block: int, threshold: float, groups: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, 3))
    order, group = rng.permutation(n)[: max(1, n - 3)], rng.integers(groups, size=n)
    kept = deduplicate(features, order, threshold=threshold, group=group, block=block)
    assert kept.tolist() == greedy(features, order, threshold, group)
    alone = deduplicate(features, order, threshold=threshold, block=block)
    assert alone.tolist() == greedy(features, order, threshold, np.zeros(n))
    # No two that stay are alike, and each that went is like one that stays.
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosines = unit @ unit.T
    assert (cosines[np.ix_(alone, alone)] - 2 * np.eye(len(alone)) < threshold).all()
    gone = np.setdiff1d(order, alone)
    assert (cosines[np.ix_(gone, alone)].max(1, initial=1 if not len(gone) else -1) >= threshold).all()


def test_who_gives_way_by_hand() -> None:
    # arccos(0.88) = 28.36 degrees. In a row of 20-degree steps each is like its neighbour only.
    row = turned([0, 20, 40, 60])
    assert deduplicate(row).tolist() == [0, 2]
    assert deduplicate(row, np.array([1, 0, 2, 3])).tolist() == [1, 3]
    # What has gone takes nobody with it: 40 is like 20, which went; 0 and 40 are not alike.
    assert deduplicate(turned([0, 28.3])).tolist() == [0] and deduplicate(turned([0, 28.4])).tolist() == [0, 1]
    # At the threshold exactly: the same patch. Length says nothing.
    edge = np.array([[1, 0], [0.88, np.sqrt(1 - 0.88**2)]], np.float32)
    assert deduplicate(edge).tolist() == [0] and deduplicate(edge * [[3], [1e-3]]).tolist() == [0]


def test_only_patches_of_one_group_are_compared() -> None:
    same = turned([0, 0, 0, 0])
    assert deduplicate(same).tolist() == [0]
    patient = np.array(["a", "b", "a", "b"])
    assert deduplicate(same, np.array([3, 2, 1, 0]), group=patient).tolist() == [3, 2]
    assert select(same, turned([0]), budget=0, group=patient).index.tolist() == [0, 1]


def test_selection_says_which_way_chose_what_and_the_best_rank_goes_first() -> None:
    features = turned([0, 35, 70, 105, 140])
    chosen = select(features, turned([70]), turned([69, 140]), top=2, budget=0)
    # Attributes: 70, then 35 and 105 alike: the earlier row. Findings (sum): 105 (cos 36 + cos 35), then 70.
    assert chosen.index.tolist() == [2, 3, 1]
    assert [chosen.ways_of(k) for k in range(3)] == [("attributes", "findings"), ("findings",), ("attributes",)]
    assert chosen.rank.tolist() == [0, 0, 1]
    assert np.allclose(chosen.attribute, 100 * np.cos(np.radians([0, 35, 35])))
    assert np.allclose(chosen.finding, 100 * np.cos(np.radians([[1, 70], [36, 35], [34, 105]])).sum(1), atol=1e-6)
    assert (chosen.cluster == -1).all() and len(chosen) == 3


def test_each_way_alone_has_its_count_and_a_union_is_theirs() -> None:
    features = vectors(2000, 32)
    attributes, findings = vectors(20, 32, 1), vectors(2, 32, 2)
    by_attributes = select(features, attributes, budget=0, threshold=None)
    by_findings = select(features, None, findings, budget=0, threshold=None)
    by_clusters = select(features, threshold=None)
    assert len(by_attributes) == len(by_findings) == 64
    assert (np.diff(by_attributes.attribute) <= 0).all() and np.isnan(by_attributes.finding).all()
    others = np.setdiff1d(np.arange(2000), by_findings.index)
    assert finding_scores(features, findings)[others].max() <= by_findings.finding.min()
    # 57 clusters, floor(256 / 57) = 4 of each at most.
    assert 200 < len(by_clusters) <= 228 and np.bincount(by_clusters.cluster).max() <= 4
    assert by_clusters.ways.tolist() == [[False, False, True]] * len(by_clusters)
    union = select(features, attributes, findings, threshold=None)
    assert set(union.index) == {*by_attributes.index, *by_findings.index, *by_clusters.index}
    for way, single in zip(WAYS, (by_attributes, by_findings, by_clusters), strict=True):
        assert set(union.index[union.ways[:, WAYS.index(way)]]) == set(single.index)
    assert (np.diff(union.rank) >= 0).all()


def test_a_seed_is_one_answer_and_another_seed_another() -> None:
    features = vectors(500)
    first, second, third = (select(features, seed=seed).index.tolist() for seed in (0, 0, 1))
    assert first == second != third


def texture(kind: int, rng: np.random.Generator, side: int = 24) -> np.ndarray:
    """A patch of one of six tissues: stripes of three directions, dots, a gradient, plain noise."""
    y, x = np.mgrid[:side, :side] + rng.uniform(0, side, (2, 1, 1))
    wave = (np.sin(x), np.sin(y), np.sin((x + y) / 1.5), np.sin(x / 2) * np.sin(y / 2) * 2, (x - y) / side, 0 * x)[kind]
    return wave + rng.normal(0, 0.3, (side, side))


def spectra(patches: np.ndarray) -> np.ndarray:
    spectrum = np.abs(np.fft.fft2(patches))[:, :7, :7].reshape(len(patches), -1)
    return np.log1p(np.concatenate([spectrum, patches.std((1, 2))[:, None] * 10], 1))


def test_rare_textures_are_found_where_chance_misses_them() -> None:
    rng = np.random.default_rng(0)
    known = spectra(np.stack([texture(kind, rng) for kind in range(6) for _ in range(50)]))
    truth = rng.permutation(np.repeat(np.arange(6), [1900, 30, 25, 20, 15, 10]))  # 95 % are one texture
    # The embedding is a spectrum that knows all six textures, as a model would.
    features = (spectra(np.stack([texture(kind, rng) for kind in truth])) - known.mean(0)) / known.std(0)
    covered, missed = [], 0
    for trial in range(20):
        chosen = select(features, seed=trial)
        assert len(chosen) <= 256
        covered.append(len(set(truth[chosen.index])))
        by_chance = np.random.default_rng(trial).choice(len(truth), len(chosen), replace=False)
        missed += len(set(truth[by_chance])) < 6
    assert covered == [6] * 20 and missed >= 10


def test_two_hundred_thousand_patches_do_not_take_memory_of_their_square() -> None:
    # Few directions, so few stay: 200,000 x 200,000 cosines would be 320 GB.
    features = np.tile(turned(np.arange(0, 360, 30)), (16_667, 1)).astype(np.float32)
    assert deduplicate(features).tolist() == list(range(12))
    assert len(attribute_scores(features, turned([15, 100]))) == 200_004


def test_few_patches_or_none() -> None:
    assert len(select(np.zeros((0, 8), np.float32), vectors(3), vectors(2))) == 0
    one = select(vectors(1), vectors(3), np.zeros((0, 8)))
    assert one.index.tolist() == [0] and one.ways.tolist() == [[True, False, True]] and np.isnan(one.finding).all()
    assert len(select(vectors(5), budget=0)) == 0
    assert len(select(vectors(5), vectors(2), top=0, budget=0)) == 0
    assert len(select(vectors(5), threshold=None, budget=2)) == 2  # more clusters than the budget holds


def broken(row: int, value: float) -> np.ndarray:
    features = vectors(1500)
    features[row] = value
    return features


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: select(broken(1203, 0.0)), "row 1203 of features is 0"),
        (lambda: select(broken(7, np.nan)), "row 7 of features is 0 or not finite"),
        (lambda: select(broken(7, np.inf)), "row 7 of features is 0 or not finite"),
        (lambda: select(vectors(9), vectors(3, d=5)), r"attributes of shape \(3, 5\): give \(n, 8\)"),
        (lambda: select(vectors(9), None, vectors(3)[0]), r"findings of shape \(8,\)"),
        (lambda: select(vectors(9)[0]), r"features of shape \(8,\)"),
        (lambda: select(vectors(9), top=-1), "top is -1"),
        (lambda: select(vectors(9), ratio=0.0), "ratio"),
        (lambda: deduplicate(vectors(9), threshold=1.1), "threshold"),
        (lambda: deduplicate(vectors(9), group=np.zeros(8)), "8 group labels for 9 features"),
    ],
)
def test_what_cannot_be_chosen_from_is_one_line(call: object, words: str) -> None:
    with pytest.raises(SlideError, match=words) as error:
        call()  # pyright: ignore[reportCallIssue]
    assert "\n" not in str(error.value)
