"""Optical density, in which stains add up (Beer-Lambert): OD = -ln(I / white), a channel at a time.

The natural logarithm, as every implementation has it (the papers write log10, which changes the unit of
concentrations and of `beta`, and no stain vector). `white` is what the scanner shows where there is no tissue: 240, as
in Veta's normalisation code, or the glass as measured, one figure a channel (`np.median(overview[~mask], 0)`): without
it, tinted glass counts as stain. Grey value 0 counts as 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from slides.errors import SlideError

White = float | Sequence[float]  # one grey value, or those of red, green, blue
WHITE = 240.0
BETA = 0.15  # Macenko 2009
_BLOCK = 1 << 16  # pixels at a time: 768 kB of float32 stay in the cache
_MOST = 2_000_000  # pixels that an estimate looks at
_FEWEST = 100  # tissue pixels that it needs: below, a 1 % percentile is one pixel


def pixels_of(image: np.ndarray) -> np.ndarray:
    """uint8 (n, 3), a view where the memory allows, of uint8 (..., 3).

    Raises:
        SlideError: another type or shape.
    """
    if image.dtype != np.uint8 or image.ndim < 2 or image.shape[-1] != 3:
        raise SlideError(
            f"stain: pixels of type {image.dtype}, shape {image.shape}: give uint8 RGB, the last dimension 3 (grey, "
            "16-bit and RGBA images are to be converted first)"
        )
    return image.reshape(-1, 3)


def density(image: np.ndarray, white: White = WHITE) -> np.ndarray:
    """Optical density, float32 (..., 3), of uint8 (..., 3); negative where brighter than `white`."""
    return -_logs(white)[image, np.arange(3)]


def tissue_pixels(image: np.ndarray, *, white: White = WHITE, beta: float = BETA) -> np.ndarray:
    """The pixels that are tissue, uint8 (k, 3): those whose mean density over the channels is `beta` or more.

    The mean, where Veta's code asks it of every channel: pure eosin hardly absorbs red, and would be thrown away. Of
    more than two million pixels two million are drawn, always the same.

    Args:
        image: uint8 (..., 3); one image, or patches of a slide.
        white: grey value of the bare glass.
        beta: lowest mean optical density of tissue.

    Raises:
        SlideError: no uint8 RGB, or hardly any tissue.
    """
    pixels = pixels_of(image)
    if len(pixels) > _MOST:
        pixels = pixels[np.random.default_rng(0).integers(0, len(pixels), _MOST)]
    tissue = pixels[density(pixels, white).mean(-1) >= beta]
    if len(tissue) < _FEWEST:
        raise SlideError(
            f"stain: {len(tissue)} of {len(pixels)} pixels are tissue (mean density of {beta:g} or more, white at "
            f"{white}), {_FEWEST} are needed: give a part with tissue, or a lower beta"
        )
    return tissue


def recolour(
    image: np.ndarray,
    matrix: np.ndarray,
    shift: np.ndarray | None = None,
    *,
    white: White = WHITE,
    new_white: White | None = None,
) -> np.ndarray:
    """Image whose densities are `od @ matrix + shift`: a table, one product by a (3, 3) matrix, one exponential.

    Args:
        image: uint8 (..., 3).
        matrix: (3, 3), from the densities of red, green, blue to the new ones.
        shift: (3,), added to the new densities.
        white: grey value of the bare glass in `image`.
        new_white: and in the result; the same where None.

    Returns:
        uint8, of the image's shape.

    Raises:
        SlideError: no uint8 RGB.
    """
    pixels = pixels_of(image)
    out = np.empty(pixels.shape, np.uint8)
    table = _logs(white)[None]
    # The new white comes in as a shift of the logarithms: the exponential is then the grey value itself.
    offset = np.log(_per_channel(white if new_white is None else new_white)) - (0 if shift is None else shift)
    affine = np.concatenate([matrix.T, offset[:, None]], 1).astype(np.float32)
    for start in range(0, len(pixels), _BLOCK):
        block = np.ascontiguousarray(pixels[start : start + _BLOCK, None])
        logs = cv2.transform(cv2.LUT(block, table), affine)
        # convertScaleAbs rounds and saturates at 255; an exponential has no sign to lose.
        out[start : start + _BLOCK] = cv2.convertScaleAbs(cv2.exp(logs)).reshape(-1, 3)
    return out.reshape(image.shape)


def _logs(white: White) -> np.ndarray:
    """ln(I / white), (256, 3)."""
    return np.log(np.maximum(np.arange(256), 1)[:, None] / _per_channel(white)).astype(np.float32)


def _per_channel(white: White) -> np.ndarray:
    values = np.asarray(white, np.float64)
    if values.shape not in ((), (3,)) or not ((values >= 1) & (values <= 255)).all():
        raise SlideError(
            f"stain: white is {white}: give the grey value of the bare glass, 1 to 255 (usually 240), or three"
        )
    return np.broadcast_to(values, 3)
