from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from medclip.app.features import FeatureStore, find_sets
from medclip.types import UserError
from slides.errors import SlideError
from slides.open import open_slide
from tests.app.viewer_toys import grid, write_features
from tests.slides.toys import toy_slide


def random(count: int = 80, dim: int = 16, seed: int = 0) -> np.ndarray:
    return 5 * np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)


def test_sets_are_found_in_both_layouts(tmp_path: Path) -> None:
    write_features(tmp_path / "20x" / "features_tiny" / "a.h5", random(), grid(), weights="00ff")
    write_features(tmp_path / "clam" / "features_other" / "h5_files" / "b.h5", random(dim=8), grid(), encoder="other")
    (tmp_path / "20x" / "patches").mkdir()
    with h5py.File(tmp_path / "20x" / "patches" / "a_patches.h5", "w") as file:
        file.create_dataset("coords", data=grid())  # coordinates alone are no features
    found = {one.encoder: one for one in find_sets(tmp_path)}
    assert set(found) == {"tiny", "other"}
    assert (found["tiny"].dim, found["tiny"].weights, set(found["tiny"].files)) == (16, "00ff", {"a"})
    assert (found["other"].dim, found["other"].weights, set(found["other"].files)) == (8, None, {"b"})


def test_no_features(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no features in it: make them"):
        find_sets(tmp_path)
    (tmp_path / "features_x" / "a.zarr").mkdir(parents=True)
    with pytest.raises(UserError, match=r"only zarr"):
        find_sets(tmp_path)
    with pytest.raises(UserError, match=r"no such folder"):
        find_sets(tmp_path / "none")


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    write_features(tmp_path / "in" / "features_tiny" / "a.h5", random(), grid())
    outside = write_features(tmp_path / "out" / "b.h5", random(), grid())
    (tmp_path / "in" / "features_tiny" / "b.h5").symlink_to(outside)
    (found,) = find_sets(tmp_path / "in")
    assert set(found.files) == {"a"}


def store_of(folder: Path) -> FeatureStore:
    (found,) = find_sets(folder)
    return FeatureStore({"tiny": found}, 10**9)


def test_scores_are_cosines_whatever_the_lengths(tmp_path: Path) -> None:
    features = random()
    write_features(tmp_path / "features_tiny" / "a.h5", features, grid())
    path = toy_slide(tmp_path / "a.svs").path
    bag = store_of(tmp_path).bag("tiny", "a", lambda: open_slide(path))
    text = np.random.default_rng(1).normal(size=16)
    text /= np.linalg.norm(text)
    by_hand = features @ text / np.linalg.norm(features, axis=1)
    np.testing.assert_allclose(bag.scores(torch.from_numpy(text).float()), by_hand, atol=1e-3)
    assert bag.side == 100 and torch.allclose(bag.unit(3).norm(), torch.ones(()))


def test_features_of_another_slide_are_refused(tmp_path: Path) -> None:
    write_features(tmp_path / "features_tiny" / "a.h5", random(), grid())
    small = toy_slide(tmp_path / "a.svs", 400, 300).path  # patches lie outside of it
    with pytest.raises(SlideError, match=r"a\.h5"):
        store_of(tmp_path).bag("tiny", "a", lambda: open_slide(small))
    fits = toy_slide(tmp_path / "b.svs").path
    write_features(tmp_path / "features_tiny" / "a.h5", random(), grid(), slide_identity="0123")
    with pytest.raises(SlideError, match=r"another file"):
        store_of(tmp_path).bag("tiny", "a", lambda: open_slide(fits))


def test_other_widths_and_missing_ones_are_one_line(tmp_path: Path) -> None:
    write_features(tmp_path / "features_tiny" / "a.h5", random(), grid())
    write_features(tmp_path / "features_tiny" / "b.h5", random(dim=8), grid())
    store = store_of(tmp_path)
    for name, why in (("b", r"shape \(80, 8\), not \(80, 16\)"), ("c", "no features of it")):
        with pytest.raises(SlideError, match=why):
            store.sample("tiny", name, 10)


def test_a_sample_is_spread_over_the_slide(tmp_path: Path) -> None:
    features = random(5000)
    coords = np.stack([np.arange(5000), np.zeros(5000, np.int64)], 1)
    write_features(tmp_path / "features_tiny" / "a.h5", features, coords)
    bag = store_of(tmp_path).sample("tiny", "a", 640)
    assert 600 < len(bag.coords) <= 640
    rows = bag.coords[:, 0]
    assert np.histogram(rows, 5, (0, 5000))[0].min() >= 100
    np.testing.assert_allclose(bag.features.float().numpy(), features[rows], rtol=1e-3, atol=1e-3)
    assert len(store_of(tmp_path).sample("tiny", "a", 3).coords) == 3
