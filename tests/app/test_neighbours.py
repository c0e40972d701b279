from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import torch

from medclip.app.features import Bag, FeatureStore, find_sets
from medclip.app.neighbours import Cohort, best
from tests.app.viewer_toys import grid, write_features


def test_best_patches_overlap_no_better_one() -> None:
    coords = np.array([[0, 0], [50, 0], [100, 0], [100, 50], [300, 300]])
    bag = Bag(torch.zeros(5, 1).half(), torch.ones(5), coords, 100.0)
    scores = np.array([0.5, 0.9, 0.8, 0.7, 0.1], np.float32)
    assert [(hit.x, hit.y) for hit in best(scores, bag, "a", 3, apart=1.0)] == [(50, 0), (300, 300)]
    assert [(hit.x, hit.y) for hit in best(scores, bag, "a", 3)] == [(50, 0), (100, 0), (100, 50)]


def test_the_cohort_s_nearest_are_those_of_brute_force(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    features = {name: rng.normal(size=(80, 16)).astype(np.float32) for name in "abc"}
    for name, own in features.items():
        write_features(tmp_path / "features_tiny" / f"{name}.h5", own, grid())
    (tmp_path / "features_tiny" / "bad.h5").write_bytes(b"no")
    (found,) = find_sets(tmp_path)
    cohort = Cohort(FeatureStore({"tiny": found}, 10**9), "tiny", ["a", "b", "bad", "c", "other"], 10**6)
    assert cohort.slides == ["a", "b", "bad", "c"]  # `other` has none
    cohort.gather(threading.Event())
    assert cohort.done == 4
    unit = {name: own / np.linalg.norm(own, axis=1, keepdims=True) for name, own in features.items()}
    asked = unit["a"][5]
    hits = cohort.nearest(torch.from_numpy(asked), 6, without="a")
    wanted = sorted(
        ((float(unit[name][i] @ asked), name, *grid()[i].tolist()) for name in "bc" for i in range(80)), reverse=True
    )
    assert [(hit.slide, hit.x, hit.y) for hit in hits] == [row[1:] for row in wanted[:6]]
    assert cohort.nearest(torch.from_numpy(asked), 1, without="b")[0].slide == "a"
