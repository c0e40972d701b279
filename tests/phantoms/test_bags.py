"""Generated bags: the region decides, the mean says little, and all of it is a function of the recipe."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.spatial.distance import pdist
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from medclip.phantoms.bags import SIDE, BagRecipe, bag_row, bag_size, make_bag
from medclip.types import UserError

RECIPE = BagRecipe(slides=120, patches=200, dim=32, rare=0.01, seed=1)


def test_a_patch_tells_what_the_mean_does_not() -> None:
    bags = [make_bag(RECIPE, i) for i in range(120)]
    planted = np.array([bag_row(RECIPE, i)["label"] == "planted" for i in range(120)])
    assert [bag.planted.any() for bag in bags] == planted.tolist()
    # By labels of patches of the first half, what a head that finds the region could know of the second.
    features, truth = (np.concatenate([getattr(bag, name) for bag in bags[:60]]) for name in ("features", "planted"))
    patch = LogisticRegression(C=0.01, class_weight="balanced").fit(features, truth)
    scores = [patch.decision_function(bag.features) for bag in bags[60:]]
    assert roc_auc_score(planted[60:], [score.max() for score in scores]) > 0.95
    means = np.stack([bag.features.mean(axis=0) for bag in bags])
    mean = LogisticRegression(C=1.0, max_iter=1000).fit(means[:60], planted[:60])
    assert roc_auc_score(planted[60:], mean.decision_function(means[60:])) < 0.8
    where = [
        roc_auc_score(bag.planted, score) for bag, score in zip(bags[60:], scores, strict=True) if bag.planted.any()
    ]
    assert np.mean(where) > 0.95


def test_the_share_and_the_place_of_a_region() -> None:
    recipe = BagRecipe(patches=400, dim=2, rare=0.05)
    for index in (2, 3, 6, 7):
        bag = make_bag(recipe, index)
        n = bag_size(recipe, index)
        assert bag.features.shape == (n, 2) and bag.planted.sum() == round(0.05 * n)
        assert len(np.unique(bag.coords, axis=0)) == n and not (bag.coords % SIDE).any()
        # As near to one another as a piece of that many cells is, a half one at the edge of the tissue at most.
        assert pdist(bag.coords[bag.planted] / SIDE).max() < 2.9 * np.sqrt(2 * bag.planted.sum() / np.pi)


def test_all_is_a_function_of_recipe_and_index() -> None:
    first, again = make_bag(RECIPE, 7), make_bag(RECIPE, 7)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    other = make_bag(BagRecipe(slides=120, patches=200, dim=32, rare=0.01, seed=2), 7)
    assert first.features.shape != other.features.shape or not np.allclose(first.features, other.features)
    assert [bag_row(RECIPE, i)["patient"] for i in (0, 1, 2)] == ["bag-1-00000", "bag-1-00000", "bag-1-00001"]


def test_grades_have_more_and_findings_have_their_own_direction() -> None:
    recipe = BagRecipe(patches=300, dim=8, rare=0.02, target="ordinal")
    shares = {bag_row(recipe, i)["label"]: make_bag(recipe, i).planted.mean() for i in range(8)}
    assert [round(shares[f"grade {k}"] / 0.02) for k in range(4)] == [0, 1, 3, 9]
    recipe = BagRecipe(patches=300, dim=8, rare=0.3, shift=0, target="multilabel")
    alone = {bag_row(recipe, i)["label"]: make_bag(recipe, i) for i in range(16)}
    moved = [
        b.features[b.planted].mean(0) - b.features[~b.planted].mean(0) for n in "abc" for b in [alone[f"finding {n}"]]
    ]
    cosines = np.corrcoef(np.array(moved))
    assert (np.abs(cosines[np.triu_indices(3, 1)]) < 0.9).all() and alone[""].planted.sum() == 0


def test_more_is_sooner() -> None:
    """Exponential times of hazards that rise e-fold with each step, the events over the time at risk."""
    recipe = BagRecipe(slides=8000, patches=4, dim=2, target="survival")
    rows = [bag_row(recipe, i) for i in range(0, 8000, 2)]
    time, event = (np.array([row[name] for row in rows]) for name in ("time", "event"))
    hazards = [event[k::4].sum() / time[k::4].sum() for k in range(4)]
    assert np.allclose(np.diff(np.log(hazards)), 1, atol=0.2) and abs(hazards[0] / 0.02 - 1) < 0.2
    assert bag_row(recipe, 0) | {"slide": ""} == bag_row(recipe, 1) | {"slide": ""}  # a patient's slides share it


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"slides": 0}, "phantoms.slides is 0"),
        ({"rare": 2}, "phantoms.rare is 2"),
        ({"target": "x"}, "phantoms.target is 'x'"),
        ({"bags": 3}, "unknown keys \\['bags'\\]: use slides, patches"),
    ],
)
def test_bad_recipes_are_refused_in_a_line(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BagRecipe.parse(config)
