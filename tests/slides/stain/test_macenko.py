"""Macenko's estimate and the transfer on tissue of known stains, and beside an independent implementation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slides.errors import SlideError
from slides.stain.macenko import Macenko
from slides.stain.stains import REFERENCE, Stains, concentrations, transfer
from tests.slides.stain.tissue_toys import PAIRS, angles, tissue, unit

DATA = Path(__file__).parents[4] / "shared" / "data"


@pytest.mark.parametrize("glass", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("pair", PAIRS)
def test_known_vectors_and_amounts_are_found_among_glass(pair: str, glass: float) -> None:
    pixels, truth, amounts = tissue(pair, glass=glass)
    stains = Macenko().estimate(pixels)
    assert angles(stains.matrix, truth).max() < 1.0
    assert np.allclose(np.linalg.norm(stains.matrix, axis=1), 1) and stains.matrix[0, 0] > stains.matrix[1, 0]
    # The amount of tissue's 99 %, whatever the share of glass.
    assert np.allclose(stains.top, np.percentile(amounts, 99, axis=0), rtol=0.05)


def test_tinted_glass_is_no_stain_once_it_is_measured() -> None:
    pixels, truth, _ = tissue("veta", white=(250, 240, 190))
    assert angles(Macenko(white=(250, 240, 190)).estimate(pixels).matrix, truth).max() < 1.0
    assert angles(Macenko().estimate(pixels).matrix, truth).max() > 5.0


def test_the_estimate_does_not_depend_on_the_shape_or_order_of_pixels() -> None:
    pixels, _, _ = tissue("imagej", n=40_000)
    stains = Macenko().estimate(pixels)
    for other in (pixels.reshape(4, 100, 100, 3), pixels.reshape(200, 200, 3)[::-1, ::-1]):
        again = Macenko().estimate(other)
        assert np.allclose(again.matrix, stains.matrix) and np.allclose(again.top, stains.top)


def test_a_slide_keeps_its_own_colours() -> None:
    pixels, _, _ = tissue("ruifrok", noise=0.0)
    stains = Macenko().estimate(pixels)
    change = np.abs(transfer(pixels, stains, stains).astype(int) - pixels)
    assert change.mean() < 0.5 and np.percentile(change, 99) <= 2


@pytest.mark.parametrize("pair", ["ruifrok", "bluish"])
def test_a_slide_gets_the_targets_stains(pair: str) -> None:
    pixels, _, _ = tissue(pair)
    moved = transfer(pixels, Macenko().estimate(pixels), REFERENCE)
    found = Macenko().estimate(moved)
    assert angles(found.matrix, REFERENCE.matrix).max() < 2.0
    assert np.allclose(found.top, REFERENCE.top, rtol=0.05)


def test_a_transfer_is_beer_lambert_with_the_targets_vectors() -> None:
    # The same amounts under both pairs: what the target slide would have shown.
    source = Stains(unit(PAIRS["ruifrok"]), np.array([2.0, 1.5]))
    target = Stains(unit(PAIRS["veta"]), np.array([1.0, 1.5]), white=250.0)
    amounts = np.random.default_rng(0).uniform(0, 1, (500, 2))
    seen = np.rint(240 * np.exp(-amounts @ source.matrix)).astype(np.uint8)
    expected = 250 * np.exp(-(amounts * [0.5, 1.0]) @ target.matrix)
    assert np.abs(transfer(seen, source, target) - expected).max() < 2.5  # what rounding in `seen` comes to
    assert np.abs(concentrations(seen, source) - amounts).max() < 0.05


def test_glass_stays_glass() -> None:
    pixels, _, _ = tissue("veta")
    glass = np.tile(np.array([240, 246, 250], np.uint8)[:, None], 3)
    moved = transfer(glass, Macenko().estimate(pixels), REFERENCE)
    assert np.abs(moved.astype(int) - glass).max() <= 8


def grey() -> np.ndarray:
    ramp = np.random.default_rng(0).integers(20, 200, (100, 100, 1))
    return np.repeat(ramp, 3, 2).astype(np.uint8)


@pytest.mark.parametrize(
    "image",
    [np.full((100, 100, 3), (120, 60, 140), np.uint8), grey(), np.zeros((50, 50, 3), np.uint8)],
    ids=["constant", "grey", "black"],
)
def test_one_colour_is_one_line(image: np.ndarray) -> None:
    with pytest.raises(SlideError, match="one colour only") as error:
        Macenko().estimate(image)
    assert "\n" not in str(error.value)


def test_settings_out_of_range_are_one_line() -> None:
    with pytest.raises(SlideError, match="alpha"):
        Macenko(alpha=50)


@pytest.mark.skipif(not DATA.is_dir(), reason="the sample data is not beside the checkout")
def test_real_tissue_beside_torchstain() -> None:
    import openslide

    with openslide.OpenSlide(DATA / "wsi" / "CMU-1-Small-Region.svs") as slide:
        image = np.asarray(slide.read_region((0, 0), 0, (1500, 1500)).convert("RGB"))
    stains = Macenko().estimate(image)
    # torchstain 1.4.1 (NumPy, defaults) on the same pixels. Haematoxylin agrees; its eosin comes only from pixels that
    # also absorb red, and from a plane through the mean, so that it lies nearer to haematoxylin than ours.
    theirs = np.array([[0.778, 0.548, 0.308], [0.18, 0.91, 0.373]])
    apart = angles(stains.matrix, theirs)
    assert apart[0] < 2 and apart[1] < 11
    assert stains.matrix[1, 0] < theirs[1, 0]
    change = np.abs(transfer(image, stains, stains).astype(int) - image)
    assert np.median(change) <= 2  # what lies off the plane of two stains (red cells) is lost


@pytest.mark.skipif(not DATA.is_dir(), reason="the sample data is not beside the checkout")
def test_real_tiles_of_three_tissues_come_closer_to_each_other() -> None:
    method = Macenko()
    files = sorted((DATA / "lc25000_lung").glob("lung_*/*"))[::60]
    means = {"before": [], "after": []}
    for file in files:
        image = np.asarray(Image.open(file).convert("RGB"))
        moved = transfer(image, method.estimate(image), REFERENCE)
        tissue_of = image.mean(-1) < 200
        means["before"].append(image[tissue_of].mean(0))
        means["after"].append(moved[tissue_of].mean(0))
    hue = {key: unit(-np.log(np.array(rows) / 255)) for key, rows in means.items()}
    spread = {key: angles(rows, np.broadcast_to(rows.mean(0), rows.shape)).mean() for key, rows in hue.items()}
    assert len(files) > 10 and spread["after"] < 0.6 * spread["before"]
