"""Reinhard's means and spreads, exact as far as 8 bits go, in a Lab that is the CIE's."""

from __future__ import annotations

import numpy as np
import pytest

from slides.errors import SlideError
from slides.stain.reinhard import Colours, Reinhard
from tests.slides.stain.tissue_toys import tissue


def lab(pixels: np.ndarray) -> np.ndarray:
    """CIE Lab of sRGB under D65 by the standard's formulas, float64."""
    rgb = pixels / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    matrix = [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]]
    xyz = linear @ np.array(matrix).T / [0.950456, 1.0, 1.088754]
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


def test_statistics_are_those_of_tissue_in_cie_lab() -> None:
    pixels, _, _ = tissue("veta", glass=0.7)
    dark = pixels[-np.log(np.maximum(pixels, 1) / 240).mean(1) >= 0.15]
    colours = Reinhard().estimate(pixels)
    assert np.allclose(colours.mean, lab(dark).mean(0), atol=0.05)
    assert np.allclose(colours.std, lab(dark).std(0), atol=0.05)


def test_means_and_spreads_become_the_targets() -> None:
    pixels, _, _ = tissue("ruifrok", glass=0.0)
    method = Reinhard()
    source = method.estimate(pixels)
    tissue_only = pixels[-np.log(np.maximum(pixels, 1) / 240).mean(1) >= 0.15]
    target = Colours(
        source.mean + np.array([4.0, -5.0, 3.0]), source.std * np.array([0.8, 0.7, 0.9])
    )  # within sRGB: nothing is cut off
    moved = lab(method.transfer(tissue_only, source, target))
    assert np.allclose(moved.mean(0), target.mean, atol=0.1) and np.allclose(moved.std(0), target.std, atol=0.1)


def test_a_slide_keeps_its_own_colours_over_blocks_and_batches() -> None:
    pixels, _, _ = tissue("bluish")
    method = Reinhard()
    colours = method.estimate(pixels)
    batch = pixels.reshape(10, 100, 100, 3)
    assert np.abs(method.transfer(batch, colours, colours).astype(int) - batch).max() <= 1


def test_glass_keeps_its_colour_and_the_change_fades_in_without_an_edge() -> None:
    pixels, _, _ = tissue("veta")
    method = Reinhard()
    source = method.estimate(pixels)
    target = Colours(source.mean + np.array([-20.0, 10.0, 5.0]), source.std)
    grey = np.repeat(np.arange(150, 256, dtype=np.uint8)[:, None], 3, 1)
    moved = method.transfer(grey, source, target).astype(int)
    assert (moved[grey[:, 0] >= 240] == grey[grey[:, 0] >= 240]).all()
    assert (np.abs(moved - grey)[grey[:, 0] < 200].max(1) > 20).all()
    assert np.abs(np.diff(moved, axis=0)).max() <= 5  # 30 grey levels of shift over the 34 that glass fades in


@pytest.mark.parametrize(
    "image",
    [
        np.full((100, 100, 3), (120, 60, 140), np.uint8),
        np.repeat(np.random.default_rng(0).integers(20, 200, (100, 100, 1)), 3, 2).astype(np.uint8),
    ],
    ids=["constant", "grey"],
)
def test_one_colour_is_one_line(image: np.ndarray) -> None:
    with pytest.raises(SlideError, match="one colour only") as error:
        Reinhard().estimate(image)
    assert "\n" not in str(error.value)
