"""Colours: matplotlib's, of even lightness; the ends of a scale are what the legend says."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import pytest
from matplotlib import colormaps

from slides.errors import SlideError
from slides.heat_colours import DIVERGING, SEQUENTIAL, Scale, make_scale, table


def lightness(palette: str) -> np.ndarray:
    rgb = table(palette)[None].astype(np.float32) / 255
    return cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB)[0, :, 0]


@pytest.mark.parametrize("palette", SEQUENTIAL)
def test_lightness_rises_all_the_way(palette: str) -> None:
    """What is read by lightness alone, by the colour-blind or in grey print, has the right order."""
    steps = np.diff(lightness(palette)[::8])
    assert (steps > 0).all() and steps.std() < 0.5 * steps.mean()
    theirs = colormaps[palette](np.arange(256))[:, :3] * 255
    assert np.abs(table(palette) - theirs).max() <= 0.5


@pytest.mark.parametrize("palette", DIVERGING)
def test_diverging_palettes_are_lightest_at_0(palette: str) -> None:
    found = lightness(palette)
    assert 120 <= found.argmax() <= 135 and found[0] < 60 > found[-1]


def test_the_ends_are_percentiles_or_as_given() -> None:
    values = np.arange(101.0)
    assert make_scale(values, percentiles=(10, 90)) == Scale(10, 90, "viridis", "percentiles 10 to 90 of this slide")
    assert make_scale(values, "magma", limits=(-3, 4)) == Scale(-3, 4, "magma", "fixed scale")
    centred = make_scale(values - 20, "RdBu_r", percentiles=(0, 100))
    assert (centred.low, centred.high) == (-80, 80) and "centred on 0" in centred.said
    assert np.ptp(centred.colour(np.array(0.0)).astype(int)) < 6  # white, or nearly
    assert make_scale(np.array([1.0, np.nan, np.inf, 3.0]), percentiles=(0, 100)).high == 3


def test_values_get_the_colours_of_their_places() -> None:
    scale = Scale(0, 2, "viridis", "")
    found = scale.colour(np.array([[-5.0, 0.0, 1.0], [2.0, 9.0, np.nan]]))
    colours = table("viridis")
    assert np.array_equal(found, colours[[[0, 0, 128], [255, 255, 0]]]) and found.dtype == np.uint8


@pytest.mark.parametrize("value", [0.0, 7.0, -1e-30])
def test_values_all_alike_have_a_scale(value: float) -> None:
    scale = make_scale(np.full(9, value))
    assert scale.low < value < scale.high
    assert scale.said == "all values alike"


@pytest.mark.parametrize(
    ("palette", "percentiles", "limits", "says"),
    [
        ("jet", (1, 99), None, "choose one of viridis"),
        ("viridis", (99, 1), None, "must be below"),
        ("viridis", (1, 101), None, "0 to 100"),
        ("viridis", (1, 99), (1, 1), "must be below"),
        ("viridis", (1,), None, "give two numbers"),
        ("RdBu_r", (1, 99), (0, 1), "centred on 0"),
    ],
)
def test_scales_that_make_no_sense(
    palette: str, percentiles: Sequence[float], limits: Sequence[float] | None, says: str
) -> None:
    with pytest.raises(SlideError, match=says):
        make_scale(np.arange(3.0), palette, percentiles=percentiles, limits=limits)
