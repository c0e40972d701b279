"""Boxes and windows against torchvision and open_clip's own arithmetic; augmentations against Pillow."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from torchvision.transforms import RandomResizedCrop

from medclip.data.crop import Box, ColourJitter, Flip, RandomCrop, Turn, evaluation_fit
from medclip.data.decode import read_image
from medclip.types import Preprocess, UserError


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 10**6))
@settings(max_examples=300, deadline=None)
def test_boxes_lie_inside_the_image_and_on_the_grid(height: int, width: int, seed: int) -> None:
    box = RandomCrop((0.3, 1.0)).sample(height, width, np.random.default_rng(seed))
    assert box.top >= 0 and box.left >= 0 and box.height > 0 and box.width > 0
    assert box.top + box.height <= height and box.left + box.width <= width
    shorter = min(height, width)
    grid = 8 if shorter >= 1024 else 4 if shorter >= 512 else 2 if shorter >= 256 else 1
    assert box.top % grid == 0 and box.left % grid == 0


@pytest.mark.parametrize("scale", [(0.9, 1.0), (0.08, 1.0)])
def test_boxes_are_distributed_as_torchvisions(scale: tuple[float, float]) -> None:
    height, width, n = 240, 200, 4000
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    image = torch.zeros(1, height, width)
    ours = np.array([RandomCrop(scale).sample(height, width, rng) for _ in range(n)])
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(n)])
    # Means and spreads of top, left, height and width agree within sampling error (4 standard errors).
    error = 4 * np.hypot(ours.std(0), theirs.std(0)) / np.sqrt(n)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) <= error).all()
    assert np.allclose(ours.std(0), theirs.std(0), rtol=0.1)


def test_an_image_too_long_for_any_box_falls_back_to_its_centre_as_in_torchvision() -> None:
    for height, width in [(40, 400), (400, 40)]:
        theirs = RandomResizedCrop.get_params(torch.zeros(1, height, width), [0.9, 1.0], [3 / 4, 4 / 3])
        assert RandomCrop().sample(height, width, np.random.default_rng(0)) == Box(*theirs)


def test_the_same_generator_state_gives_the_same_box() -> None:
    boxes = [RandomCrop().sample(600, 700, np.random.default_rng([7, 1, 3])) for _ in range(2)]
    assert boxes[0] == boxes[1] != RandomCrop().sample(600, 700, np.random.default_rng([7, 1, 4]))


def test_evaluation_windows_worked_by_hand() -> None:
    # 300 x 401 to a square of 100: the short side to 100, the long one to int(133.67), centred by round(16.5) = 16.
    assert evaluation_fit(Preprocess(size=(100, 100)), 300, 401)[1:] == ((100, 133), (0, 16))
    # The long side to 100, the short one to round(74.8), and 12 rows of fill above.
    longest = Preprocess(size=(100, 100), resize_mode="longest")
    assert evaluation_fit(longest, 300, 401)[1:] == ((75, 100), (-12, 0))
    assert evaluation_fit(Preprocess(size=(10, 20), resize_mode="squash"), 7, 3)[1:] == ((10, 20), (0, 0))


def test_turn_draws_all_eight_symmetries_evenly_and_flip_two() -> None:
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    rng = np.random.default_rng(0)
    for augment, symmetries in [(Turn(), 8), (Flip(), 2)]:
        drawn = [augment(image, rng).tobytes() for _ in range(800)]
        counts = {picture: drawn.count(picture) for picture in drawn}
        assert len(counts) == symmetries
        assert min(counts.values()) > 0.6 * 800 / symmetries


def test_colour_jitter_is_pillows_enhancement() -> None:
    image = np.random.default_rng(1).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    jitter = ColourJitter(0.4, 0.3, 0.5, p=1.0)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        factors = [rng.uniform(1 - x, 1 + x) for x in (0.4, 0.3, 0.5)]
        expected = Image.fromarray(image)
        for enhance, factor in zip(
            (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors, strict=True
        ):
            expected = enhance(expected).enhance(factor)
        ours = jitter(image, np.random.default_rng(seed)).astype(int)
        difference = np.abs(ours - np.asarray(expected))
        assert difference.max() <= 5 and difference.mean() < 2  # Pillow cuts off after every step
    assert np.array_equal(ColourJitter(p=0.0)(image, np.random.default_rng(0)), image)


def test_augmentations_follow_the_crop_from_the_same_generator() -> None:
    image = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    png = io.BytesIO()
    Image.fromarray(image).save(png, "PNG")
    preprocess = Preprocess(size=(32, 32))

    def read(crop: RandomCrop, seed: int) -> np.ndarray:
        return read_image(png.getvalue(), preprocess, crop=crop, rng=np.random.default_rng(seed))

    plain, mirrored = (read(crop, 5) for crop in (RandomCrop(), RandomCrop(then=[Flip(p=1.0)])))
    assert np.array_equal(mirrored, plain[:, ::-1])
    assert not np.array_equal(read(RandomCrop(), 6), plain)


@pytest.mark.parametrize("options", [{"scale": (2, 3)}, {"scale": (0.9, 0.5)}, {"scale": (0, 1)}, {"ratio": (-1, 1)}])
def test_impossible_crops_are_refused(options: dict[str, tuple[float, float]]) -> None:
    with pytest.raises(UserError, match=r"crop\.(scale|ratio) is"):
        RandomCrop(**options)
