"""The map as a slide: what openslide reads is the map, at every level, at the right size; memory stays small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import openslide
import pytest

from slides.errors import SlideError
from slides.heat_colours import Scale, table
from slides.heat_tiff import write_heat_tiff
from slides.heatmap import HeatMap, heat_map
from slides.open import open_slide
from tests.slides.test_heatmap import lattice
from tests.slides.toys import openslide_level, toy_slide

SCALE = Scale(0, 1, "viridis", "")
SIZE = (1500, 1150)
RNG = np.random.default_rng(2)


@pytest.fixture(scope="module")
def heat() -> HeatMap:
    coords = lattice(24, 18, 61.44, (5, 3))
    coords = coords[RNG.random(len(coords)) < 0.7]
    return heat_map(RNG.random(len(coords)), coords, 61.44, SIZE)


def colours(heat: HeatMap, size: tuple[int, int], down: float) -> np.ndarray:
    values, _ = heat.sample(0, 0, *size, down)
    return np.where(np.isnan(values)[..., None], 255, SCALE.colour(values)).astype(np.uint8)


@pytest.mark.parametrize("downsample", [1, 4])
def test_openslide_reads_the_map(heat: HeatMap, tmp_path: Path, downsample: int) -> None:
    path = write_heat_tiff(tmp_path / "m.tiff", heat, SCALE, mpp=0.25, downsample=downsample, compression="deflate")
    with openslide.OpenSlide(path) as slide:
        assert slide.dimensions == (SIZE[0] // downsample, SIZE[1] // downsample)
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.25 * downsample, rel=1e-3)
        assert max(slide.level_dimensions[-1]) <= 1024
        assert slide.level_downsamples[1:] == pytest.approx([4], rel=0.01) if downsample == 1 else True
    size = (SIZE[0] // downsample, SIZE[1] // downsample)
    assert np.array_equal(openslide_level(path), colours(heat, size, downsample))
    with open_slide(path) as ours:
        assert ours.mpp == pytest.approx(0.25 * downsample, rel=1e-3)


def test_lower_levels_are_means_of_values_not_of_colours(tmp_path: Path) -> None:
    """Where 0 and 1 alternate below the pixel, it is the colour of 0.5, which no mixture of the ends is."""
    coords = lattice(256, 256, 8)
    heat = heat_map((coords.sum(1) / 8 % 2).astype(float), coords, 8, (2048, 2048))
    path = write_heat_tiff(tmp_path / "m.tiff", heat, SCALE, mpp=0.5, compression="deflate", downsample=2)
    with openslide.OpenSlide(path) as slide:
        assert slide.level_count == 1
    path = write_heat_tiff(tmp_path / "m.tiff", heat, SCALE, mpp=0.5, compression="deflate", downsample=16)
    assert np.abs(openslide_level(path).astype(int) - table("viridis")[128]).max() <= 1


def test_jpeg_is_near(heat: HeatMap, tmp_path: Path) -> None:
    path = write_heat_tiff(tmp_path / "m.tiff", heat, SCALE, mpp=0.25)
    off = np.abs(openslide_level(path).astype(int) - colours(heat, SIZE, 1))
    assert off.mean() < 1.5
    assert path.stat().st_size < 0.07 * SIZE[0] * SIZE[1] * 3


def test_over_the_slide(heat: HeatMap, tmp_path: Path) -> None:
    toy = toy_slide(tmp_path / "s.svs", *SIZE)
    with open_slide(toy.path) as slide:
        path = write_heat_tiff(
            tmp_path / "m.tiff", heat, SCALE, mpp=0.25, compression="deflate", over=slide, alpha=0.25
        )
        below = slide.read(0, 0, 0, *SIZE)
    values, share = heat.sample(0, 0, *SIZE, 1.0)
    found = openslide_level(path)
    assert np.array_equal(found[share == 0], below[share == 0])
    expected = 0.75 * below[share == 1] + 0.25 * SCALE.colour(values[share == 1])
    assert np.abs(found[share == 1] - expected).max() <= 0.51
    small = openslide_level(path, 1)
    assert np.abs(small.astype(int) - found[: small.shape[0] * 4, : small.shape[1] * 4].reshape(
        small.shape[0], 4, small.shape[1], 4, 3).mean((1, 3))).mean() < 3  # fmt: skip


@pytest.mark.parametrize(("options", "says"), [({"downsample": 0}, "downsample 0"), ({"compression": "lzw"}, "lzw")])
def test_options_that_make_no_sense(heat: HeatMap, tmp_path: Path, options: dict, says: str) -> None:
    with pytest.raises(SlideError, match=says):
        write_heat_tiff(tmp_path / "m.tiff", heat, SCALE, mpp=0.25, **options)
    assert list(tmp_path.iterdir()) == []


LARGE = """
import resource, sys
import numpy as np
from slides.heat_colours import make_scale
from slides.heat_tiff import write_heat_tiff
from slides.heatmap import heat_map
x, y = np.meshgrid(np.arange(0, 100_000, 512), np.arange(0, 80_000, 512))
coords = np.stack([x.ravel(), y.ravel()], 1)
coords = coords[((coords - (50_000, 40_000)) ** 2).sum(1) < 35_000**2]
heat = heat_map(np.random.default_rng(0).random(len(coords)), coords, 512, (100_000, 80_000))
write_heat_tiff(sys.argv[1], heat, make_scale(heat.grid), mpp=0.25)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.slow
def test_a_map_of_8_10_9_pixels_fits_into_500_mb(tmp_path: Path) -> None:
    path = tmp_path / "large.tiff"
    done = subprocess.run([sys.executable, "-c", LARGE, str(path)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 500
    with openslide.OpenSlide(path) as slide:
        assert slide.dimensions == (100_000, 80_000)
        assert np.asarray(slide.read_region((50_000, 40_000), 0, (8, 8)))[..., :3].std(axis=(0, 1)).max() < 3
