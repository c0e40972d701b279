from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest

from slides import quality
from slides.tissue import tissue_mask
from tests.slides.test_tissue import MPP, PENS, SHAPE, SVS, region, slide, strokes

TILES = Path(__file__).parents[3] / "shared" / "data" / "lc25000_lung"


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma))


def jpeg(image: np.ndarray, level: int = 85) -> np.ndarray:
    done = cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, level])[1], cv2.IMREAD_COLOR)
    return np.asarray(done, np.uint8)


def test_optical_density() -> None:
    found = quality.optical_density(np.array([255, 128, 26, 1, 0], np.uint8))
    np.testing.assert_allclose(found, [0, 0.29933, 0.99157, 2.40654, 2.40654], atol=2e-5)


@pytest.mark.parametrize("name", PENS)
def test_pen_is_found_and_nothing_else(name: str) -> None:
    rng = np.random.default_rng(0)
    tissue = region(rng)
    plain = slide(tissue, rng)
    image, ink = strokes(plain, PENS[name], rng)
    found = quality.pen(image, MPP)
    assert found[ink & ~tissue].mean() > 0.97
    near = cv2.dilate(ink.astype(np.uint8), np.ones((17, 17), np.uint8)) > 0
    assert not (found & ~near).any()
    assert not quality.pen(plain, MPP).any()


@pytest.mark.parametrize("strength", [0.3, 1.0, 2.5])
def test_stain_is_no_pen(strength: float) -> None:
    """Haematoxylin alone, eosin alone, DAB (0.27 0.57 0.78, Ruifrok & Johnston), and a scanner's black border."""
    ramp = np.linspace(0, strength, 200)[:, None, None]
    for dye in ([0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.10, 0.80, 0.45], [0.27, 0.57, 0.78]):
        image = np.broadcast_to(255 * 10 ** (-ramp * np.array(dye)), (200, 200, 3)).round().astype(np.uint8).copy()
        assert not quality.pen(image, MPP).any()
        image[:, :50] = 3
        assert not quality.pen(image, MPP).any()


def test_specks_are_no_pen() -> None:
    image = np.full((*SHAPE, 3), 240, np.uint8)
    image[100:110, 100:110] = image[300:304, 100:600] = (20, 130, 60)  # 80 µm, 32 µm wide
    assert not quality.pen(image, MPP).any()
    assert quality.pen(image, 4 * MPP)[105, 105]  # the same pixels, four times as large


@pytest.mark.skipif(not TILES.is_dir(), reason="the sample data is not beside the checkout")
def test_real_tissue_is_no_pen() -> None:
    """H&E of lung with many red cells: below one pixel in a thousand, and in few tiles any at all."""
    tiles = sorted(TILES.rglob("*.jp*g"))[::9]
    shares = np.array([quality.pen(cv2.imread(str(path))[..., ::-1]).mean() for path in tiles])  # pyright: ignore
    assert len(shares) > 50 and shares.mean() < 1e-3 and (shares > 0).mean() < 0.05


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_fold_is_tissue_twice(strength: float) -> None:
    rng = np.random.default_rng(1)
    tissue = region(rng, 0.5)
    image = slide(tissue, rng, strength, grain=1)
    fold = np.zeros(SHAPE, np.uint8)
    cv2.line(fold, (100, 180), (520, 330), 1, 14)
    twice = (fold > 0) & tissue
    assert twice.sum() > 2000
    doubled = np.where(twice[..., None], (image / 255.0) ** 2 * 255 * 0.8, image).astype(np.uint8)
    found = quality.folds(doubled, tissue)
    assert found[twice].mean() > 0.6
    assert found[tissue & ~twice].mean() < 0.02
    assert quality.folds(image, tissue)[tissue].mean() < 0.005
    assert not (found & ~tissue).any()


@pytest.mark.parametrize("sigma", [3.0, 5.0])
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_the_blurred_half_is_found(sigma: float, strength: float) -> None:
    rng = np.random.default_rng(2)
    tissue = region(rng, 0.6)
    image = jpeg(slide(tissue, rng, strength))
    left = np.zeros(SHAPE, bool)
    left[:, : SHAPE[1] // 2] = True
    mixed = jpeg(np.where(left[..., None], blurred(image, sigma), image))
    found = quality.blur(mixed, MPP, tissue)
    inner = cv2.erode(left.astype(np.uint8), np.ones((71, 71), np.uint8)) > 0
    outer = cv2.dilate(left.astype(np.uint8), np.ones((71, 71), np.uint8)) == 0
    assert found[tissue & inner].mean() > 0.9
    assert found[tissue & outer].mean() < 0.05  # made tissue has no detail below two pixels: a hard case
    assert not (found & ~tissue).any()


@pytest.mark.skipif(not SVS.is_file(), reason="the sample data is not beside the checkout")
@pytest.mark.parametrize("side", [1200, 600, 300])
def test_blur_on_a_real_slide(side: int) -> None:
    with openslide.OpenSlide(str(SVS)) as opened:
        image = np.asarray(opened.get_thumbnail((side, side)).convert("RGB"))
        mpp = 0.499 * opened.dimensions[0] / image.shape[1]
    tissue = tissue_mask(image, mpp)
    shares = [
        quality.blur(jpeg(one), mpp, tissue)[tissue].mean() for one in (image, blurred(image, 3), blurred(image, 5))
    ]
    assert shares[0] < 0.01 and min(shares[1:]) > 0.9


def test_glass_is_not_blurred() -> None:
    image = slide(np.zeros(SHAPE, bool), np.random.default_rng(3), vignette=0.3)
    assert not quality.blur(image, MPP, np.ones(SHAPE, bool)).any()


def test_sharpness_of_a_wave_by_hand() -> None:
    """The Laplacian of a sin(wx) is -(2 - 2 cos w) a sin(wx), whose variance is (2 - 2 cos w)² a² / 2."""
    x = np.arange(258)
    patches = []
    for period in (4, 8, 16):
        wave = np.round(127 + 100 * np.sin(2 * np.pi * x / period))
        patches.append(np.broadcast_to(wave[None, :, None], (258, 258, 3)))
    found = quality.sharpness(np.array(patches, np.uint8))
    expected = [(2 - 2 * np.cos(2 * np.pi / period)) ** 2 * 100**2 / 2 for period in (4, 8, 16)]
    np.testing.assert_allclose(found, expected, rtol=0.02)


def test_sharpness_falls_with_blur_and_does_not_know_grey_levels() -> None:
    rng = np.random.default_rng(4)
    patch = slide(np.ones(SHAPE, bool), rng)[:256, :256]
    found = quality.sharpness(np.stack([patch, *(blurred(patch, sigma) for sigma in (0.7, 1.5, 3))]))
    assert (np.diff(found) < 0).all() and found[0] > 5 * found[2]
    lighter = np.minimum(patch, 215) + 40
    np.testing.assert_allclose(
        quality.sharpness(lighter[None]), quality.sharpness(np.minimum(patch, 215)[None]), rtol=1e-3
    )
    assert quality.sharpness(np.empty((0, 8, 8, 3), np.uint8)).shape == (0,)


def test_bright_and_dark() -> None:
    rng = np.random.default_rng(5)
    tissue = region(rng)
    image = slide(tissue, rng)
    image[:40, :40] = 20
    bright, dark = quality.bright(image), quality.dark(image)
    inside = cv2.erode(tissue.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    outside = cv2.dilate(tissue.astype(np.uint8), np.ones((5, 5), np.uint8)) == 0
    outside[:45, :45] = False
    assert bright[outside].all() and bright[inside].mean() < 0.05
    assert dark[:40, :40].all() and not dark[outside].any()
    # As bright as glass, but with texture: standard deviation 20 instead of 2, most of it below white.
    rough = np.clip(235 + 20 * rng.standard_normal((60, 60, 1)).repeat(3, 2), 0, 255).astype(np.uint8)
    assert quality.bright(rough).mean() < 0.3


def test_summary_of_a_slide_whose_numbers_are_known() -> None:
    image = np.full((200, 300, 3), 230, np.uint8)
    tissue = np.zeros((200, 300), bool)
    tissue[50:150, 50:250] = True
    image[50:150, 50:150] = (200, 100, 150)
    image[50:150, 150:250] = (100, 50, 75)
    found = quality.summary(image, tissue, 10.0)
    grey = np.array([0.299 * r + 0.587 * g + 0.114 * b for r, g, b in ((200, 100, 150), (100, 50, 75))]) / 255
    assert found["tissue_mm2"] == pytest.approx(2.0)
    assert found["tissue_share"] == pytest.approx(1 / 3)
    assert found["brightness"] == pytest.approx(grey.mean(), abs=0.003)
    assert found["contrast"] == pytest.approx((grey[0] - grey[1]) / 2, abs=0.003)
    assert found["saturation"] == pytest.approx(0.5, abs=0.003)
    assert found["glass"] == pytest.approx(230 / 255)
    assert (found["pen_share"], found["bright_share"], found["dark_share"]) == (0, 0, 0)


def test_summary_shows_what_is_wrong_and_where_there_is_nothing() -> None:
    rng = np.random.default_rng(6)
    tissue = region(rng)
    image = slide(tissue, rng)
    good = quality.summary(image, tissue, MPP)
    soft = quality.summary(jpeg(blurred(image, 4)), tissue, MPP)
    inked = quality.summary(strokes(image, PENS["green"], rng)[0], tissue, MPP)
    assert soft["blur_share"] > 0.9 > 0.01 > good["blur_share"]
    assert soft["sharpness"] < good["sharpness"] / 20
    assert inked["pen_share"] > 0.03 and good["pen_share"] == 0
    empty = quality.summary(image, np.zeros_like(tissue), MPP)
    assert set(empty) == set(good) and empty["tissue_mm2"] == 0 and np.isnan(empty["sharpness"])
    assert np.isnan(quality.summary(image, np.ones_like(tissue), MPP)["glass"])
