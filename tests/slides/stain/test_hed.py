"""HED jitter against scikit-image's conversion there and back."""

from __future__ import annotations

import numpy as np
import pytest

from slides.errors import SlideError
from slides.stain.hed import RUIFROK, HedJitter, restain

IMAGE = np.array([[[120, 60, 140], [200, 120, 180]], [[90, 70, 110], [150, 90, 90]]], np.uint8)


def test_changed_stains_are_scikit_images() -> None:
    # scikit-image 0.26.0: 255 * hed2rgb(rgb2hed(x / 255) * [1.2, 0.8, 0.9] + [0.1, -0.02, 0.05] / -ln(1e-6)). No stain
    # of these pixels is negative: there it would cut off, and we do not.
    theirs = [[99.77, 55.574, 128.88], [183.133, 119.904, 172.385], [70.871, 55.36, 99.503], [138.231, 87.933, 91.248]]
    ours = restain(IMAGE, np.array([1.2, 0.8, 0.9]), np.array([0.1, -0.02, 0.05]))
    assert np.abs(ours.reshape(-1, 3) - theirs).max() <= 0.51


def test_one_stain_alone_gets_stronger_along_its_own_vector() -> None:
    light = np.rint(255 * np.exp(-0.8 * RUIFROK[:1])).astype(np.uint8)
    ours = restain(light, np.array([1.5, 1.0, 1.0]), np.zeros(3))
    assert np.abs(ours - 255 * np.exp(-1.2 * RUIFROK[0])).max() <= 1.5


def test_no_jitter_is_no_change() -> None:
    image = np.random.default_rng(0).integers(1, 256, (64, 64, 3), dtype=np.uint8)
    assert (HedJitter(0, 0)(image, np.random.default_rng(0)) == image).all()


def test_draws_are_the_generators_and_stay_in_range() -> None:
    jitter = HedJitter(scale=0.2, shift=0.1)
    first, second = (jitter(IMAGE, np.random.default_rng([3, 1])) for _ in range(2))
    assert (first == second).all() and (first != jitter(IMAGE, np.random.default_rng([3, 2]))).any()
    # A batch gets one draw, and one draw is taken from the generator a call.
    both = jitter(np.stack([IMAGE, IMAGE]), np.random.default_rng([3, 1]))
    assert (both[0] == first).all() and (both[1] == first).all()
    # On glass (no stain) only the shift shows: |density| of each channel at most 0.1 * the column sum.
    glass = np.full((1, 1, 3), 255, np.uint8)
    rng = np.random.default_rng(0)
    seen = np.array([jitter(glass, rng)[0, 0] for _ in range(300)], float)
    lowest = 255 * np.exp(-0.1 * RUIFROK.sum(0))
    assert (seen >= lowest - 1).all() and (seen.min(0) < lowest + 20).all()


def test_factors_and_shifts_go_both_ways_evenly() -> None:
    # Pure haematoxylin of 0.8: its concentration in the result is factor * 0.8 + shift, from -ln(I / 255) @ RUIFROK^-1.
    light = np.rint(255 * np.exp(-0.8 * RUIFROK[:1])).astype(np.uint8)
    rng = np.random.default_rng(0)
    for jitter, lowest, highest in ((HedJitter(0.2, 0.0), 0.64, 0.96), (HedJitter(0.0, 0.1), 0.7, 0.9)):
        seen = np.concatenate([jitter(light, rng) for _ in range(500)])
        amount = (-np.log(seen / 255) @ np.linalg.inv(RUIFROK))[:, 0]
        assert np.allclose([amount.min(), amount.mean(), amount.max()], [lowest, 0.8, highest], atol=0.03)


@pytest.mark.parametrize(("scale", "shift"), [(-0.1, 0.0), (1.0, 0.0), (0.1, -1.0), (float("nan"), 0.0)])
def test_settings_out_of_range_are_one_line(scale: float, shift: float) -> None:
    with pytest.raises(SlideError, match="jitter"):
        HedJitter(scale, shift)
