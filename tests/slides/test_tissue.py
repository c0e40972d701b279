"""Tissue masks against made slides whose tissue is known, and on a real one."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
import shapely
from scipy.spatial import KDTree

from slides.errors import SlideError
from slides.geojson import mask_to_geojson
from slides.mask import Mask, from_geometries
from slides.tissue import tissue_mask

SVS = Path(__file__).parents[3] / "shared" / "data" / "wsi" / "CMU-1-Small-Region.svs"
SHAPE, MPP = (500, 640), 8.0
# Ruifrok & Johnston 2001 for haematoxylin; eosin as slides have it, with more blue than the pure dye.
HAEMATOXYLIN, EOSIN = np.array([0.65, 0.70, 0.29]), np.array([0.10, 0.80, 0.45])
PENS = {
    "blue": (40, 60, 170),
    "dark blue": (30, 40, 120),
    "green": (20, 130, 60),
    "cyan": (30, 140, 170),
    "red": (200, 30, 45),
    "black": (28, 27, 30),
}


def noise(sigma: float, rng: np.random.Generator, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    """Smooth noise of mean 0 and standard deviation 1."""
    field = cv2.GaussianBlur(rng.standard_normal(shape).astype(np.float32), (0, 0), sigma)
    return (field - field.mean()) / field.std()


def region(rng: np.random.Generator, share: float = 0.3) -> np.ndarray:
    """Where the tissue is: a few pieces away from the border."""
    y, x = np.mgrid[-1 : 1 : SHAPE[0] * 1j, -1 : 1 : SHAPE[1] * 1j]
    field = noise(40, rng) - 2 * np.maximum(abs(x), abs(y)) ** 4
    return field > np.quantile(field, 1 - share)


def slide(
    tissue: np.ndarray,
    rng: np.random.Generator,
    strength: float = 1.0,
    glass: tuple[int, int, int] = (243, 243, 245),
    vignette: float = 0.0,
    grain: float = 1.5,
) -> np.ndarray:
    """An overview by Lambert-Beer: stain of this strength on glass of this colour, darker towards the corners."""
    nuclei = np.clip(0.25 + 0.15 * noise(2, rng) + 0.1 * noise(20, rng), 0.05, None) * strength
    stroma = np.clip(0.3 + 0.1 * noise(3, rng) + 0.1 * noise(30, rng), 0.08, None) * strength
    density = np.where(tissue[..., None], nuclei[..., None] * HAEMATOXYLIN + stroma[..., None] * EOSIN, 0)
    y, x = np.mgrid[-1 : 1 : SHAPE[0] * 1j, -1 : 1 : SHAPE[1] * 1j]
    light = np.array(glass) * (1 - vignette * (x**2 + y**2) / 2)[..., None]
    return np.clip(np.round(light * 10**-density + grain * rng.standard_normal((*SHAPE, 3))), 0, 255).astype(np.uint8)


def strokes(image: np.ndarray, colour: tuple[int, int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A line around the tissue and a ring, soft and uneven, saved as JPEG; and where they are."""
    ink = np.zeros(SHAPE, np.uint8)
    cv2.polylines(ink, [np.array([[30, 40], [200, 25], [600, 60], [615, 450]])], False, 1, 22)
    cv2.circle(ink, (75, 420), 40, 1, 18)
    soft = cv2.GaussianBlur(ink.astype(np.float32), (0, 0), 1.5) * (0.9 + 0.1 * np.clip(noise(6, rng), -1, 1))
    drawn = image * (np.array(colour) / 255) ** (0.95 * soft[..., None])
    done = cv2.imdecode(
        cv2.imencode(".jpg", drawn.astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 80])[1], cv2.IMREAD_COLOR
    )
    assert done is not None
    return np.asarray(done, np.uint8), ink > 0


def iou(one: np.ndarray, two: np.ndarray) -> float:
    return (one & two).sum() / (one | two).sum()


GLASS = {
    "white": {"glass": (255, 255, 255)},
    "usual": {},
    "grey": {"glass": (200, 200, 201)},
    "yellow": {"glass": (236, 231, 214)},
    "blue": {"glass": (222, 230, 240)},
    "vignetted": {"vignette": 0.25},
    "yellow and vignetted": {"glass": (236, 231, 214), "vignette": 0.25},
    "grainy": {"grain": 4.0},
}


@pytest.mark.parametrize("strength", [1.0, 0.4, 0.2])
@pytest.mark.parametrize("name", GLASS)
def test_tissue_from_dark_to_pale_on_every_glass(name: str, strength: float) -> None:
    rng = np.random.default_rng(0)
    tissue = region(rng)
    assert iou(tissue_mask(slide(tissue, rng, strength, **GLASS[name]), MPP), tissue) > 0.96


@pytest.mark.parametrize("name", GLASS)
def test_no_tissue_is_an_empty_mask(name: str) -> None:
    """Otsu's threshold would split any of them."""
    image = slide(np.zeros(SHAPE, bool), np.random.default_rng(1), **GLASS[name])
    assert not tissue_mask(image, MPP).any()


def test_one_colour_only_is_an_empty_mask() -> None:
    for level in (255, 240, 0):
        assert not tissue_mask(np.full((50, 60, 3), level, np.uint8), MPP).any()


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.25])
def test_nothing_but_tissue_is_a_full_mask(strength: float) -> None:
    assert tissue_mask(slide(np.ones(SHAPE, bool), np.random.default_rng(2), strength), MPP).mean() > 0.99


def test_pale_tissue_beside_dark_tissue() -> None:
    """A split of the histogram between dark and pale would lose the pale half."""
    rng = np.random.default_rng(3)
    tissue = region(rng, 0.4)
    dark, pale = slide(tissue, rng, 2.0), slide(tissue, rng, 0.2)
    image = np.where(np.arange(SHAPE[1])[:, None] < SHAPE[1] // 2, dark, pale)
    assert iou(tissue_mask(image, MPP), tissue) > 0.96


def test_fat_is_tissue() -> None:
    """Cells of 0.1 mm of which only the membranes are stained, and these are pale."""
    rng = np.random.default_rng(4)
    tissue = region(rng)
    centres = rng.random((round(SHAPE[0] * SHAPE[1] * (MPP / 100) ** 2), 2)) * SHAPE
    distance = KDTree(centres).query(np.argwhere(np.ones(SHAPE, bool)), k=2)[0]
    membrane = (distance[:, 1] - distance[:, 0] < 1.6).reshape(SHAPE)
    image = slide(tissue & membrane, rng, 0.4)
    assert iou(tissue_mask(image, MPP), tissue) > 0.9
    assert iou(tissue_mask(image, MPP, "hsv"), tissue) < 0.2  # what a threshold without a model makes of it


def test_black_borders_and_white_padding() -> None:
    rng = np.random.default_rng(5)
    tissue = region(rng)
    for level in (0, 8, 255):
        image = slide(tissue, rng, 0.4, glass=(232, 228, 215))
        image[:, :120] = level
        image[:90] = level
        left = tissue.copy()
        left[:, :120] = left[:90] = False
        found = tissue_mask(image, MPP)
        assert iou(found, left) > 0.96
        assert found[~left & (image == level).all(-1)].sum() < 100


def test_a_slide_that_is_mostly_padding() -> None:
    rng = np.random.default_rng(6)
    tissue = region(rng)
    image = slide(tissue, rng, 0.4, glass=(232, 228, 215))
    image[:, 330:] = 255
    tissue[:, 330:] = False
    image = np.pad(image, ((0, 900), (0, 900), (0, 0)), constant_values=255)
    assert iou(tissue_mask(image, MPP), np.pad(tissue, ((0, 900), (0, 900)))) > 0.96


@pytest.mark.parametrize("name", PENS)
def test_pen_is_no_tissue(name: str) -> None:
    rng = np.random.default_rng(7)
    tissue = region(rng)
    image, ink = strokes(slide(tissue, rng), PENS[name], rng)
    found = tissue_mask(image, MPP)
    assert iou(found, tissue & ~ink) > 0.9
    assert found[ink & ~tissue].mean() < 0.03
    assert tissue_mask(image, MPP, pen=False)[ink & ~tissue].mean() > 0.9  # the option turns it off


def test_holes_and_parts_by_their_area() -> None:
    """Squares: a hole of 0.016 mm² is filled and one of 0.09 mm² is not; a part of 0.01 mm² is dropped."""
    tissue = np.zeros(SHAPE, bool)
    tissue[50:400, 50:400] = True
    tissue[100:116, 100:116] = False  # 16 pixels of 8 µm
    tissue[200:238, 200:238] = False
    tissue[50:62, 500:512] = True
    tissue[200:238, 500:538] = True
    found = tissue_mask(slide(tissue, np.random.default_rng(8)), MPP)
    assert found[108, 108] and not found[219, 219] and not found[56, 506] and found[219, 519]
    found = tissue_mask(slide(tissue, np.random.default_rng(8)), MPP, fill_holes_um2=0, min_area_um2=0)
    assert not found[108, 108] and found[56, 506]
    found = tissue_mask(slide(tissue, np.random.default_rng(8)), MPP, fill_holes_um2=1e6, min_area_um2=1e6)
    assert found[219, 219] and not found[219, 519]


def test_the_resolution_of_the_overview_hardly_matters() -> None:
    rng = np.random.default_rng(9)
    tissue = region(rng)
    image = slide(tissue, rng, 0.5)
    for times, least in ((2, 0.95), (4, 0.9)):
        size = (SHAPE[1] // times, SHAPE[0] // times)
        found = tissue_mask(cv2.resize(image, size, interpolation=cv2.INTER_AREA), MPP * times).astype(np.uint8)
        assert iou(cv2.resize(found, SHAPE[::-1], interpolation=cv2.INTER_NEAREST) > 0, tissue) > least


def test_clam_is_what_its_authors_published() -> None:
    """Against the chain written with scipy: saturation, median of 7, above 8, closing by 4 x 4.

    A closing by an even square is lopsided in cv2, and CLAM's masks are off by that pixel: hence the origin.
    """
    from scipy import ndimage

    rng = np.random.default_rng(10)
    image = slide(region(rng), rng, 0.3)
    high, low = image.max(-1).astype(float), image.min(-1).astype(float)
    saturation = np.round((high - low) / high * 255)
    binary = ndimage.median_filter(saturation, 7, mode="nearest") > 8
    square = np.ones((4, 4))
    closed = ndimage.binary_dilation(np.pad(binary, 8, mode="edge"), square, origin=-1)
    closed = ndimage.binary_erosion(closed, square)[8:-8, 8:-8]
    found = tissue_mask(image, MPP, "hsv", fill_holes_um2=0, min_area_um2=0)
    assert iou(found, closed) > 0.999


def test_otsu_splits_where_the_classes_part() -> None:
    rng = np.random.default_rng(11)
    tissue = region(rng)
    image = slide(tissue, rng)
    assert iou(tissue_mask(image, MPP, "otsu"), tissue) > 0.96
    # It is a threshold of its own image: pale tissue beside dark is lost, which is why it is not the default.
    half = np.arange(SHAPE[1]) < SHAPE[1] // 2
    mixed = np.where(half[:, None], slide(tissue, rng, 2.0), slide(tissue, rng, 0.2))
    assert tissue_mask(mixed, MPP, "otsu")[tissue & ~half].mean() < 0.5


def test_the_same_image_gives_the_same_mask() -> None:
    rng = np.random.default_rng(12)
    image = slide(region(rng), rng, 0.3)
    before = image.copy()
    np.testing.assert_array_equal(tissue_mask(image, MPP), tissue_mask(image, MPP))
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (3, 2), (7, 300)])
@pytest.mark.parametrize("method", ["robust", "otsu", "hsv"])
def test_tiny_overviews(shape: tuple[int, int], method: str) -> None:
    image = np.random.default_rng(0).integers(0, 255, (*shape, 3), np.uint8)
    assert tissue_mask(image, 50.0, method).shape == shape  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("image", "mpp", "method", "match"),
    [
        (np.zeros((5, 5), np.uint8), 8.0, "robust", "uint8 RGB"),
        (np.zeros((5, 5, 4), np.uint8), 8.0, "robust", "uint8 RGB"),
        (np.zeros((5, 5, 3), np.float32), 8.0, "robust", "uint8 RGB"),
        (np.zeros((0, 5, 3), np.uint8), 8.0, "robust", "uint8 RGB"),
        (np.zeros((5, 5, 3), np.uint8), 0.0, "robust", "above 0"),
        (np.zeros((5, 5, 3), np.uint8), np.nan, "robust", "above 0"),
        (np.zeros((5, 5, 3), np.uint8), 8.0, "unet", "robust, otsu or hsv"),
    ],
)
def test_what_cannot_be_masked(image: np.ndarray, mpp: float, method: str, match: str) -> None:
    with pytest.raises(SlideError, match=match):
        tissue_mask(image, mpp, method)  # pyright: ignore[reportArgumentType]


@pytest.mark.skipif(not SVS.is_file(), reason="the sample data is not beside the checkout")
def test_a_real_slide() -> None:
    """Skin: the mask holds what is plainly stained and no plain glass, and comes back from GeoJSON."""
    with openslide.OpenSlide(str(SVS)) as opened:
        image = np.asarray(opened.get_thumbnail((600, 600)).convert("RGB"))
        size0 = opened.dimensions
    downsample = size0[0] / image.shape[1]
    found = tissue_mask(image, 0.499 * downsample)
    saturation = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)[..., 1]
    stained = cv2.morphologyEx((saturation > 60).astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8)) > 0
    parts, labels, stats, _ = cv2.connectedComponentsWithStats(stained.astype(np.uint8))
    largest = labels == 1 + np.argmax(stats[1:parts, cv2.CC_STAT_AREA])
    assert found[largest].mean() > 0.995
    assert not found[:, :60][:200].any() and not found[300:, :80].any()  # glass, left of the tissue
    assert 0.3 < found.mean() < 0.5
    rows = mask_to_geojson(Mask(found, downsample))["features"]
    again = from_geometries([shapely.geometry.shape(row["geometry"]) for row in rows], size0, downsample).array
    assert iou(again[: found.shape[0], : found.shape[1]], found) > 0.98
