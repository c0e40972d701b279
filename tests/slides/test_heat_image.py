"""The picture: the map lies where its patches are, and the legend's numbers and scale bar are true."""

from __future__ import annotations

import numpy as np
import pytest

from slides.heat_colours import Scale, table
from slides.heat_image import blend, draw, font, number, shortened
from slides.heatmap import heat_map
from slides.overview import Overview

SCALE = Scale(0, 1, "viridis", "fixed scale")


def test_nothing_is_drawn_where_there_is_no_patch() -> None:
    heat = heat_map(np.array([0.0, 1.0]), np.array([[0, 0], [192, 128]]), 64, (320, 256))
    image = np.random.default_rng(0).integers(0, 255, (128, 160, 3), np.uint8)
    found = blend(image, heat, SCALE, 0.25, downsample=2)
    rest = np.ones((128, 160), bool)
    for (x, y), colour in (((0, 0), table("viridis")[0]), ((96, 64), table("viridis")[255])):
        part = slice(y, y + 32), slice(x, x + 32)
        rest[part] = False
        assert np.abs(found[part] - (0.75 * image[part] + 0.25 * colour)).max() <= 0.51
    assert np.array_equal(found[rest], image[rest])


@pytest.mark.parametrize(("mpp", "length"), [(2.0, 200), (0.5, 50), (8.0, 1000)])
def test_the_scale_bar_is_as_long_as_it_says(mpp: float, length: float) -> None:
    """Of 600 pixels a quarter is 150: the longest of 1, 2, 5 x 10^n µm within it."""
    seen = Overview(np.full((400, 600, 3), 255, np.uint8), 4.0, mpp)
    heat = heat_map(np.array([1.0]), np.array([[0, 0]]), 64, (2400, 1600))
    image = np.asarray(draw(seen, heat, SCALE, title="s", label="l").convert("L"))[400:]
    dark = image[:, 400:] < 80
    longest = max(row.sum() for row in dark)
    assert longest == pytest.approx(length / mpp, abs=3)


def test_numbers_tell_the_ends_apart() -> None:
    assert [number(v, Scale(0, 1, "viridis", "")) for v in (0.0, 0.5)] == ["0.00", "0.50"]
    assert number(0.1234567, Scale(0.1234, 0.1239, "viridis", "")) == "0.123457"
    assert number(123456.0, Scale(0, 1e6, "viridis", "")) == "1.23e+05"


def test_long_titles_are_cut() -> None:
    face = font(20)
    found = shortened("a very long prompt " * 20, face, 300)
    assert found.endswith("…") and face.getlength(found) <= 300 and shortened("short", face, 300) == "short"
