"""What spoils a slide, found on its overview by classical means: pen, folds, blur, glare, darkness.

The checks are those of HistoQC (Janowczyk et al. 2019, JCO Clinical Cancer Informatics 3:1-7), each a function of its
own that returns where the image is bad. They know stains by how they absorb: haematoxylin, eosin and DAB are told from
marker pens, trichrome's or Alcian blue are not.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import cv2
import numpy as np

OD = -np.log10(np.maximum(np.arange(256), 1) / 255).astype(np.float32)
# At most this bright in every channel, a pixel is what a scanner leaves black, not stained tissue.
BLACK = 24
_NARROWEST = 60.0  # µm: no pen writes as thin
_DETAIL = 0.5  # grey levels: contrast below this is the noise of sensor and JPEG


def optical_density(image: np.ndarray) -> np.ndarray:
    """-log10(I / 255) of uint8 pixels, 0 for white and 2.4 for black; float32 of the same shape."""
    return OD[image]


def extremes(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest of the three channels of (h, w, 3), each (h, w)."""
    red, green, blue = cv2.split(image)
    return cv2.min(cv2.min(red, green), blue), cv2.max(cv2.max(red, green), blue)


def pen(image: np.ndarray, mpp: float | None = None) -> np.ndarray:
    """Where marker pen lies: blue, green, red or black.

    By Lambert-Beer a dye has the same ratio of optical densities however thick it is. Blue and green inks absorb more
    red than green light, which no haematoxylin does (0.65 : 0.70, Ruifrok & Johnston 2001); red ink absorbs green and
    blue alike and no red, eosin half as much blue as green; black ink absorbs all alike. A stroke is wide and long, so
    what is narrower than 0.06 mm or smaller than 0.02 mm² is no pen: specks of dye, clumps of red cells. Ink over
    stained tissue is found in part.

    Args:
        image: uint8 RGB (h, w, 3) overview.
        mpp: of the overview; without it a stroke is taken to be at least 5 pixels wide.

    Returns:
        bool (h, w).
    """
    red, green, blue = (cv2.LUT(channel, OD) for channel in cv2.split(cv2.blur(image, (5, 5))))
    mean = (red + green + blue) / 3
    spread = cv2.max(cv2.max(red, green), blue) - cv2.min(cv2.min(red, green), blue)
    cold = red > 1.08 * green + 0.02
    warm = (red < 0.3 * green) & (blue > 0.7 * green)
    grey = spread < 0.2 * mean
    core = (cold & (red > 0.35)) | (warm & (green > 0.55)) | (grey & (mean > 0.6) & ~_frame(image))
    if not core.any():
        return core
    width = 5 if mpp is None else int(np.clip(round(_NARROWEST / mpp), 3, 101))
    core = as_bool(cv2.morphologyEx(core.view(np.uint8), cv2.MORPH_OPEN, _disk(width)))
    core = large(core, 6 * width * width)
    # Strokes fade at their borders: the same dyes, thinner, next to the core; and a rim that JPEG smears.
    faint = (cold & (red > 0.08)) | (warm & (green > 0.2)) | (grey & (mean > 0.15))
    grown = core | _near(core, faint, 2 * width)
    return as_bool(cv2.dilate(grown.view(np.uint8), _disk(9)))


def _frame(image: np.ndarray) -> np.ndarray:
    """Scanner-black areas that touch the border of the image."""
    black = extremes(image)[1] <= BLACK
    if not black.any():
        return black
    return large(black, np.inf, connectivity=4, keep_at_border=True)


def large(found: np.ndarray, least: float, connectivity: int = 8, keep_at_border: bool = False) -> np.ndarray:
    """The connected parts of bool (h, w) that have `least` pixels or more, or touch the border if that is enough."""
    _, components, stats, _ = cv2.connectedComponentsWithStats(found.astype(np.uint8), connectivity=connectivity)
    labels = np.asarray(components, np.intp)
    keep = np.asarray(stats)[:, cv2.CC_STAT_AREA] >= least
    if keep_at_border:
        keep[rim(labels)] = True
    keep[0] = False
    return keep[labels]


def rim(image: np.ndarray) -> np.ndarray:
    """The outermost rows and columns of (h, w), in a row."""
    return np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])


def as_bool(image: Any) -> np.ndarray:
    """uint8 zeros and ones, as cv2 gives them back, seen as bool."""
    return np.asarray(image, np.uint8).view(np.bool_)


def _near(core: np.ndarray, wide: np.ndarray, reach: int) -> np.ndarray:
    """The part of `wide` that lies within `reach` pixels of `core`."""
    return wide & as_bool(cv2.dilate(core.view(np.uint8), _disk(2 * reach + 1)))


def _disk(diameter: int) -> np.ndarray:
    diameter |= 1
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (diameter, diameter))


def folds(image: np.ndarray, tissue: np.ndarray, contrast: float = 0.25) -> np.ndarray:
    """Where tissue lies twice: more saturated and darker than the rest of it.

    Saturation less intensity is what folds raise from both ends (Kothari et al. 2013, J Pathol Inform 4:22). A fold
    lies `contrast` above the median of the slide's tissue, and three of its robust standard deviations; half of that is
    enough next to one.

    Args:
        image: uint8 RGB (h, w, 3) overview.
        tissue: bool (h, w).
        contrast: least difference from the median, of a scale from -1 to 1.

    Returns:
        bool (h, w), within the tissue.
    """
    if not tissue.any():
        return np.zeros_like(tissue)
    smooth = cv2.GaussianBlur(image, (0, 0), 1.5)
    low, high = (extreme.astype(np.float32) for extreme in extremes(smooth))
    difference = (high - low) / np.maximum(high, 1) - high / 255
    values = difference[tissue]
    middle = np.median(values)
    least = max(contrast, 3 * 1.4826 * float(np.median(np.abs(values - middle))))
    core = (tissue & (difference > middle + least)).view(np.uint8)
    core = as_bool(cv2.morphologyEx(core, cv2.MORPH_OPEN, _disk(3)))
    return _near(core, tissue & (difference > middle + least / 2), reach=7)


def blur(image: np.ndarray, mpp: float, tissue: np.ndarray, window: float = 200.0, least: float = 0.5) -> np.ndarray:
    """Where tissue is out of focus by a Gaussian of two pixels of the overview or more.

    What is sharp has about as much contrast in one octave as in the next (natural images' spectra fall as 1/f);
    blur takes the finer first. Compared are the octaves around 1.2 and 2.4 pixels, for in the very finest JPEG's
    errors outweigh what blur leaves; and those around 2.4 and 4.8, for much blur leaves nothing in the first.
    Unlike the size of the Laplacian, which HistoQC thresholds, the ratio does not depend on how strongly a region
    is stained: on H&E at 1 to 46 mpp the first was 0.65 and more for 95 % of sharp tissue, 0.45 and less for 95 %
    of tissue blurred by three pixels. Where there is no detail at all, nothing is said. Less blur can only be seen
    at full resolution: see `sharpness`.

    Args:
        image: uint8 RGB (h, w, 3) overview.
        mpp: of the overview.
        tissue: bool (h, w).
        window: side of the neighbourhood that is judged, in µm; at least 25 pixels.
        least: ratio of the first pair below which a region counts as blurred; of the second, 0.8 of it.

    Returns:
        bool (h, w), within the tissue.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    smooth = [cv2.GaussianBlur(grey, (0, 0), sigma) for sigma in (0.8, 1.6, 3.2, 6.4)]
    side = max(25, round(window / mpp)) | 1
    weight = np.maximum(cv2.blur(tissue.astype(np.float32), (side, side)), 1e-6)
    first, second, third = (
        np.sqrt(np.maximum(cv2.blur(np.where(tissue, (finer - coarser) ** 2, 0), (side, side)), 0) / weight)
        for finer, coarser in pairwise(smooth)
    )
    lost = (first < least * second) & (second > _DETAIL)
    return tissue & (lost | (second < 0.8 * least * third) & (third > 2 * _DETAIL))


def sharpness(patches: np.ndarray) -> np.ndarray:
    """Variance of the Laplacian of the grey image (Pech-Pacheco et al. 2000), in grey levels²; low for blur.

    Comparable between patches of one stain and mpp only.

    Args:
        patches: uint8 RGB (n, h, w, 3).

    Returns:
        float32 (n,).
    """
    grey = (cv2.cvtColor(patch, cv2.COLOR_RGB2GRAY) for patch in patches)
    # Without the outermost pixels, which have no neighbours.
    found = [cv2.Laplacian(one, cv2.CV_32F)[1:-1, 1:-1].var() for one in grey]
    return np.array(found, np.float32)


def bright(image: np.ndarray, least: float = 0.9, texture: float = 10.0) -> np.ndarray:
    """Where there is only glass or glare: brighter than `least` of white and without texture.

    HistoQC's LightDarkModule with its thresholds (upper_threshold 0.9, standard deviation 10).

    Args:
        image: uint8 RGB (h, w, 3) overview.
        least: brightness, 0 to 1.
        texture: standard deviation in 5 x 5 pixels, in grey levels, at which it is no glass.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    mean = cv2.blur(grey, (5, 5))
    variance = cv2.blur(grey * grey, (5, 5)) - mean * mean
    return (grey > least * 255) & (variance < texture**2)


def dark(image: np.ndarray, most: float = 0.15) -> np.ndarray:
    """Where nothing can be seen: darker than `most` of white (HistoQC's `dark`, threshold 0.15).

    Args:
        image: uint8 RGB (h, w, 3) overview.
        most: brightness, 0 to 1.
    """
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) < most * 255


def summary(image: np.ndarray, tissue: np.ndarray, mpp: float) -> dict[str, float]:
    """One row of numbers about a slide, for finding those of a cohort that stand out.

    Args:
        image: uint8 RGB (h, w, 3) overview.
        tissue: bool (h, w).
        mpp: of the overview.

    Returns:
        `tissue_mm2`; `tissue_share`, of the image; `pen_share`, of the image; `fold_share`, `blur_share`,
        `bright_share` and `dark_share`, of the tissue; `brightness`, `contrast` (its standard deviation) and
        `saturation` of the tissue, 0 to 1; `sharpness` of the tissue as in the function of that name; `glass`, the
        median brightness of the rest. NaN where there is nothing to measure.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    saturation = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)[..., 1]
    laplacian = cv2.Laplacian(grey, cv2.CV_32F)
    found = {
        "tissue_mm2": float(np.count_nonzero(tissue)) * mpp**2 / 1e6,
        "tissue_share": float(tissue.mean()),
        "pen_share": float(pen(image, mpp).mean()),
        "glass": float(np.median(grey[~tissue])) / 255 if not tissue.all() else np.nan,
    }
    if not tissue.any():
        names = ("fold_share", "blur_share", "bright_share", "dark_share")
        return found | dict.fromkeys((*names, "brightness", "contrast", "saturation", "sharpness"), np.nan)
    return found | {
        "fold_share": float(folds(image, tissue)[tissue].mean()),
        "blur_share": float(blur(image, mpp, tissue)[tissue].mean()),
        "bright_share": float(bright(image)[tissue].mean()),
        "dark_share": float(dark(image)[tissue].mean()),
        "brightness": float(grey[tissue].mean()) / 255,
        "contrast": float(grey[tissue].std()) / 255,
        "saturation": float(saturation[tissue].mean()) / 255,
        "sharpness": float(laplacian[tissue].var()),
    }
