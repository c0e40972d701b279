"""Densities against the formula, and the fast recolouring against the same in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slides.errors import SlideError
from slides.stain.od import density, pixels_of, recolour, tissue_pixels


def test_densities_by_hand() -> None:
    # 240 / e and 240 / e^2 have densities 1 and 2; the white has none, brighter is negative, black counts as 1.
    od = density(np.array([[88, 32, 240], [255, 0, 1]], np.uint8))
    assert np.allclose(od[0], [1.0, 2.0, 0.0], atol=0.02)
    assert od[1, 0] == pytest.approx(-np.log(255 / 240)) and od[1, 1] == od[1, 2] == pytest.approx(np.log(240))
    tinted = density(np.array([[250, 240, 190]], np.uint8), (250, 240, 190))
    assert np.abs(tinted).max() == 0


@given(st.integers(0, 10**6), st.floats(200, 255), st.floats(200, 255))
@settings(max_examples=40, deadline=None)
def test_recolouring_is_the_formula(seed: int, white: float, new_white: float) -> None:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (31, 17, 3), dtype=np.uint8)
    matrix, shift = np.eye(3) + rng.normal(0, 0.4, (3, 3)), rng.normal(0, 0.2, 3)
    od = -np.log(np.maximum(image.astype(np.float64), 1) / white)
    exact = np.clip(new_white * np.exp(-(od @ matrix + shift)), 0, 255)
    ours = recolour(image, matrix, shift, white=white, new_white=new_white)
    assert np.abs(ours - exact).max() <= 0.51  # rounding, and float32


def test_no_change_changes_nothing_over_block_borders_batches_and_views() -> None:
    image = np.random.default_rng(0).integers(1, 256, (3, 220, 260, 3), dtype=np.uint8)  # 171,600 pixels: three blocks
    for view in (image, image[:, ::2, ::-1], image[0]):
        assert (recolour(view, np.eye(3)) == view).all()


def test_tissue_is_dark_in_the_mean_so_pure_eosin_counts() -> None:
    eosin = np.rint(240 * np.exp(-np.array([0.07, 0.99, 0.11]))).astype(np.uint8)  # its red has a density of 0.07
    glass = np.array([243, 241, 244], np.uint8)
    pixels = np.concatenate([np.tile(eosin, (300, 1)), np.tile(glass, (5000, 1))])
    assert (tissue_pixels(pixels) == eosin).all() and len(tissue_pixels(pixels)) == 300


def test_of_very_many_pixels_always_the_same_are_looked_at() -> None:
    image = np.random.default_rng(1).integers(0, 256, (2_000_001, 3), dtype=np.uint8)
    image[:, 1] = 60
    first = tissue_pixels(image)
    assert 1_500_000 < len(first) <= 2_000_000 and (first == tissue_pixels(image)).all()


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((8, 8), np.uint8), "uint8 RGB"),
        (np.zeros((8, 8, 4), np.uint8), "uint8 RGB"),
        (np.zeros((8, 8, 3), np.uint16), "uint8 RGB"),
        (np.zeros((3,), np.uint8), "uint8 RGB"),
        (np.full((64, 64, 3), 239, np.uint8), "0 of 4096 pixels are tissue"),
        (np.zeros((0, 0, 3), np.uint8), "0 of 0 pixels are tissue"),
    ],
)
def test_pixels_that_are_no_tissue_are_one_line(image: np.ndarray, words: str) -> None:
    with pytest.raises(SlideError, match=words) as error:
        tissue_pixels(image)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("white", [0, 300, float("nan"), (240, 240), (240, 0, 240)])
def test_a_white_that_is_none_is_one_line(white: object) -> None:
    with pytest.raises(SlideError, match="grey value of the bare glass"):
        density(np.zeros((2, 2, 3), np.uint8), white)  # pyright: ignore[reportArgumentType]


def test_nothing_in_nothing_out() -> None:
    empty = np.zeros((0, 256, 256, 3), np.uint8)
    assert recolour(empty, np.eye(3)).shape == empty.shape and len(pixels_of(empty)) == 0
