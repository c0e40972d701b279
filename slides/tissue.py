"""Where the tissue is, on a slide's overview.

`robust` (the default) asks how far a pixel is from the slide's own glass, in optical density; `hsv` and `otsu` are what
CLAM does with and without a fixed threshold, for results that must compare.
"""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np

from slides import quality
from slides.errors import SlideError

# Optical densities: what glass may be at most, how far tissue is from it at least, and where no doubt is left.
_GLASS, _FAINT, _SURE = 0.25, 0.02, 0.04
_TINT = 0.06  # most difference between the densities of glass's channels
_PINK = 0.02  # most that glass absorbs green above red and blue: that tint is haematoxylin's and eosin's
_ROUGH = 2.5  # grey levels: a gradient above this is no bare glass
_RIM = 0.25
_ROUND = cv2.MORPH_ELLIPSE
_WORK = 256  # side of the image that the glass is modelled on


def tissue_mask(
    image: np.ndarray,
    mpp: float,
    method: Literal["robust", "otsu", "hsv"] = "robust",
    *,
    fill_holes_um2: float = 20_000.0,
    min_area_um2: float = 20_000.0,
    pen: bool = True,
) -> np.ndarray:
    """Where the tissue is.

    Args:
        image: uint8 RGB (h, w, 3) overview.
        mpp: of the overview.
        method: `robust`; `hsv`, CLAM's saturation above 8 of 255; `otsu`, CLAM's with Otsu's threshold, which always
            splits an image in two, be there tissue or not.
        fill_holes_um2: smaller holes are filled: fat cells, small vessels and ducts. By default a circle of 0.16 mm.
            `robust` closes gaps below 0.06 mm in any case.
        min_area_um2: smaller parts are dropped: dust. The default is little more than a patch of 256 pixels at 0.5 mpp.
        pen: leave out marker pen (`robust` only). Turn it off for stains that are blue or green by themselves.

    Returns:
        bool (h, w).

    Raises:
        SlideError: an unknown method, an image that is not RGB, or an mpp that is not above 0.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise SlideError(f"the overview is {image.dtype} of shape {image.shape}: give uint8 RGB (h, w, 3)")
    if not 0 < mpp < np.inf:
        raise SlideError(f"the overview's mpp is {mpp}: give micrometres a pixel, above 0")
    if method == "robust":
        found = _robust(image, mpp)
    elif method in ("otsu", "hsv"):
        found = _clam(image, otsu=method == "otsu")
    else:
        raise SlideError(f"tissue method is {method!r}: use robust, otsu or hsv")
    area = mpp * mpp
    if method == "robust" and pen and (ink := quality.pen(image, mpp)).any():
        # Not even as a hole in tissue does ink count; the area inside a small loop of it is no hole in tissue.
        found &= ~ink
        return _clean(found, fill_holes_um2 / area, min_area_um2 / area) & ~ink
    return _clean(found, fill_holes_um2 / area, min_area_um2 / area)


def _clam(image: np.ndarray, otsu: bool) -> np.ndarray:
    """Median-blurred saturation above a threshold, closed: CLAM (Lu et al. 2021) as published: 7, 8, 4."""
    saturation = cv2.medianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2HSV)[..., 1], 7)
    kind = cv2.THRESH_BINARY | (cv2.THRESH_OTSU if otsu else 0)
    _, binary = cv2.threshold(saturation, 0 if otsu else 8, 1, kind)
    return cv2.morphologyEx(binary, cv2.MORPH_CLOSE, np.ones((4, 4), np.uint8)) > 0


def _robust(image: np.ndarray, mpp: float) -> np.ndarray:
    """Pixels that are not glass, black or white.

    The distance from glass is how much more a pixel absorbs than it: the spread between channels, which stain has and
    shadow has not, and half of the mean. The threshold is fixed by the glass (its noise, and a floor), not by a split
    of the histogram: no tissue gives an empty mask, and dark tissue does not hide pale tissue beside it. Parts without
    a single sure pixel are dropped.
    """
    black = _black(image)
    glass, bare = _glass(image, black)
    channels = [
        _excess(channel, level)
        for channel, level in zip(cv2.split(cv2.GaussianBlur(image, (5, 5), 1.0)), cv2.split(glass), strict=True)
    ]
    low, high = quality.extremes(cv2.merge(channels))
    distance = high - low + (channels[0] + channels[1] + channels[2]) / 6
    distance[black] = 0
    distance = cv2.blur(distance, (3, 3))
    noise = 0.0
    if bare.any():
        of_glass = cv2.resize(distance, bare.shape[::-1], interpolation=cv2.INTER_NEAREST)[bare]
        noise = float(np.median(of_glass)) + 5 * 1.4826 * float(np.median(np.abs(of_glass - np.median(of_glass))))
    # Far less than what lies two pixels away is its blurred rim.
    faint = distance > np.maximum(_RIM * cv2.dilate(distance, np.ones((5, 5), np.uint8)), max(_FAINT, noise))
    sure = distance > max(_SURE, 2 * noise)
    width = int(np.clip(round(60 / mpp), 3, 31)) | 1
    closed = cv2.morphologyEx(faint.view(np.uint8), cv2.MORPH_CLOSE, cv2.getStructuringElement(_ROUND, (width, width)))
    opened = cv2.morphologyEx(closed, cv2.MORPH_OPEN, cv2.getStructuringElement(_ROUND, (3, 3)))
    count, found = cv2.connectedComponents(opened, connectivity=8)
    labels = np.asarray(found, np.int32)
    keep = np.bincount(labels[sure], minlength=count) > 0
    keep[0] = False
    return keep[labels] & ~black


def _excess(channel: np.ndarray, glass: np.ndarray) -> np.ndarray:
    """Optical density of a channel (h, w) above that of the glass (h', w'), never below 0."""
    level = cv2.resize(glass, channel.shape[::-1], interpolation=cv2.INTER_LINEAR)
    return np.maximum(cv2.LUT(channel, quality.OD) - level, 0)


def _black(image: np.ndarray) -> np.ndarray:
    """What a scanner left black, and the rim that resampling blends with it."""
    black = (quality.extremes(image)[1] <= quality.BLACK).view(np.uint8)
    if not black.any():
        return black.view(np.bool_)
    black = cv2.morphologyEx(black, cv2.MORPH_OPEN, np.ones((5, 5), np.uint8))
    return quality.as_bool(cv2.dilate(black, np.ones((9, 9), np.uint8)))


def _glass(image: np.ndarray, black: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The optical density of bare glass everywhere, float32 (h', w', 3), and where it was seen, bool (h', w').

    Glass is smooth, bright and nearly grey. Where enough of it is seen, a quadratic surface (vignetting, uneven lamps)
    is fitted to it, in three rounds that each look for glass around the last fit; else it is taken to be white. Pure
    white is what a reader pads with, and says nothing about the glass next to it.
    """
    scale = min(1.0, _WORK / max(image.shape[:2]))
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    padding = cv2.erode((quality.extremes(image)[0] == 255).astype(np.uint8), np.ones((3, 3), np.uint8))
    unseen = (black | quality.as_bool(padding)).view(np.uint8)
    unseen = cv2.resize(unseen, size, interpolation=cv2.INTER_NEAREST) > 0
    grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float32)
    slope = np.hypot(cv2.Sobel(grey, cv2.CV_32F, 1, 0, scale=0.125), cv2.Sobel(grey, cv2.CV_32F, 0, 1, scale=0.125))
    od = quality.optical_density(small)
    spread = od.max(axis=2) - od.min(axis=2)
    candidate = ~unseen & (slope < _ROUGH) & (od.max(axis=2) < _GLASS) & (spread < _TINT)
    candidate &= od[..., 1] - (od[..., 0] + od[..., 2]) / 2 < _PINK
    y, x = np.mgrid[-1 : 1 : size[1] * 1j, -1 : 1 : size[0] * 1j].astype(np.float32)
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1)
    model = np.zeros_like(od)
    bare = np.zeros_like(candidate)
    if candidate.sum() < 0.005 * candidate.size:
        return model, bare
    # The brightest that many pixels share: a tenth of the candidates may be brighter (glare).
    model[:] = np.quantile(od[candidate], 0.1, axis=0)
    for within in (0.04, 0.03, 0.02):
        bare = candidate & (np.abs(od - model).max(axis=2) < within)
        if bare.sum() < 0.005 * candidate.size:
            break
        # What is not constant is held back where little glass is seen: a slope must be seen to be believed.
        ridge = np.diag([0, 1, 1, 1, 1, 1]) * 0.002 * candidate.size
        a = terms[bare]
        model = terms @ np.linalg.solve(a.T @ a + ridge, a.T @ od[bare]).astype(np.float32)
    return np.maximum(model, 0), bare


def _clean(found: np.ndarray, hole: float, part: float) -> np.ndarray:
    """Without parts below `part` and holes below `hole` pixels; what touches the border of the image is no hole."""
    found = quality.large(found, part)
    return ~quality.large(~found, hole, connectivity=4, keep_at_border=True)
