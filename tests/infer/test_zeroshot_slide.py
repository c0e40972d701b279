"""MI-Zero's pooling, smoothing and prompt draws against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from medclip.infer.zeroshot_slide import (
    Drawn,
    check_features,
    draw_prompts,
    drawn_classifier,
    neighbours,
    patch_scores,
    pool,
    smooth,
)
from medclip.types import UserError


def test_pooling_is_the_mean_of_each_classs_own_best() -> None:
    scores = np.random.default_rng(0).normal(size=(300, 3)).astype(np.float32)
    for k in (1, 5, 50, 299):
        values = torch.from_numpy(scores).topk(k, 0).values  # the paper's code sums these
        np.testing.assert_allclose(pool(scores, k), values.double().mean(dim=0).numpy(), rtol=1e-6)
    for k in (300, 1000, None):
        np.testing.assert_allclose(pool(scores, k), scores.mean(axis=0, dtype=np.float64), rtol=1e-12)
    # One bright patch decides at k = 1 and drowns in the mean.
    lone = np.zeros((100, 2), np.float32)
    lone[:, 0], lone[7, 1] = 0.1, 0.9
    assert pool(lone, 1).argmax() == 1 and pool(lone, None).argmax() == 0


def test_scores_are_cosines() -> None:
    rng = np.random.default_rng(1)
    features = torch.from_numpy(rng.normal(size=(7, 5))).float()
    texts = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(2, 5))).float(), dim=1)
    want = torch.nn.functional.cosine_similarity(features[:, None], texts[None], dim=2)
    np.testing.assert_allclose(patch_scores(features, texts), want.numpy(), atol=1e-6)
    assert (patch_scores(torch.zeros(1, 5), texts) == 0).all()


def test_smoothing_is_over_the_nearest() -> None:
    rng = np.random.default_rng(2)
    coords = rng.permutation(400 * 300)[:120, None] // np.array([1, 400]) % np.array([400, 300])
    scores = rng.normal(size=(120, 2))
    near = neighbours(coords, 8)
    want = NearestNeighbors(n_neighbors=9).fit(coords).kneighbors(coords)[0]
    got = np.linalg.norm(coords[near] - coords[:, None], axis=2)
    np.testing.assert_allclose(np.sort(got, axis=1), want)
    assert (near[:, 0] == np.arange(120)).all()
    np.testing.assert_allclose(smooth(scores, near), scores[near].mean(axis=1))
    assert neighbours(coords[:3], 8).shape == (3, 3) and neighbours(coords[:1], 8).tolist() == [[0]]


def test_draws_take_one_name_a_class_and_some_templates() -> None:
    drawn = draw_prompts([4, 1, 2], 16, 400, seed=3)
    assert drawn == draw_prompts([4, 1, 2], 16, 400, seed=3) != draw_prompts([4, 1, 2], 16, 400, seed=4)
    sizes = np.bincount([len(one.templates) for one in drawn], minlength=17)
    assert sizes[0] == 0 and (sizes[1:] > 8).all()  # 25 of each size on average
    assert {one.names[0] for one in drawn} == {0, 1, 2, 3} and {one.names[1] for one in drawn} == {0}
    assert all(len(set(one.templates)) == len(one.templates) for one in drawn)
    prompts = [torch.nn.functional.normalize(torch.randn(16, n, 8), dim=-1) for n in (4, 1, 2)]
    one = Drawn((2, 0, 1), (0, 5))
    row = prompts[0][0, 2] + prompts[0][5, 2]
    torch.testing.assert_close(drawn_classifier(prompts, one)[0], row / row.norm())


@pytest.mark.parametrize(
    ("meta", "width", "trust", "said"),
    [
        ({"encoder": "mine", "weights": "abc"}, 8, None, "other weights"),
        ({"encoder": "conch", "weights": ""}, 8, None, "do not say which weights"),
        ({"encoder": "conch", "weights": ""}, 8, "uni", "do not say which weights"),
        ({"encoder": "mine", "weights": "me"}, 9, None, "9 wide"),
        ({"encoder": "mine", "weights": "abc"}, 8, "mine", "other weights"),  # trust does not overrule what is known
    ],
)
def test_features_of_another_model(meta: dict[str, str], width: int, trust: str | None, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_features(meta, "s1", "me", width, 8, trust)


def test_own_features_pass() -> None:
    check_features({"encoder": "x", "weights": "me"}, "s1", "me", 8, 8, None)
    check_features({"encoder": "conch", "weights": ""}, "s1", "me", 8, 8, "conch")
