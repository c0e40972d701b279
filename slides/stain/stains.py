"""The two stains of a slide, and the change of one slide's stains into another's (Macenko 2009, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from slides.errors import SlideError
from slides.stain.od import WHITE, White, density, recolour

_CLOSEST = 5.0  # degrees between two stains: closer, they cannot be told apart (H and E lie 25 to 45 degrees apart)
_FAINTEST = 0.05  # optical density that the 99 % of each stain must have


@dataclass(frozen=True, eq=False)
class Stains:
    """What haematoxylin and eosin look like on one slide.

    Args:
        matrix: (2, 3), rows of length 1: optical density of haematoxylin, then of eosin, in red, green, blue.
        top: (2,), the 99 % percentile of each one's concentration in tissue.
        white: grey value of the bare glass.
    """

    matrix: np.ndarray
    top: np.ndarray
    white: White = WHITE


# A target where no slide is to be one: the vectors and concentrations of Veta's staining-normalization code.
REFERENCE = Stains(np.array([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]]), np.array([1.9705, 1.0308]))


def least_squares(od: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Concentrations, (n, 2), of densities (n, 3); may be negative."""
    return od @ np.linalg.pinv(matrix).astype(od.dtype)


def stains_of(
    vectors: np.ndarray,
    od: np.ndarray,
    white: White,
    concentrate: Callable[[np.ndarray, np.ndarray], np.ndarray] = least_squares,
) -> Stains:
    """Two estimated vectors as `Stains`: of length 1, haematoxylin (which absorbs more of the red) first.

    Args:
        vectors: (2, 3), not negative.
        od: (n, 3), densities of tissue.
        white: grey value of the bare glass.
        concentrate: from (n, 3) densities and a (2, 3) matrix to (n, 2) concentrations.

    Raises:
        SlideError: the two are one colour, or one of them is hardly there.
    """
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    matrix = vectors / np.maximum(lengths, 1e-12)
    matrix = matrix[np.argsort(-matrix[:, 0], kind="stable")]
    angle = np.degrees(np.arccos(np.clip(matrix[0] @ matrix[1], -1, 1)))
    if not (lengths > 1e-6).all() or not angle >= _CLOSEST:
        raise SlideError(
            f"stain: the tissue has one colour only (its two stains are {angle:.1f} degrees apart): give a larger part "
            "of the slide with nuclei and stroma, or leave this slide (grey? one stain?) unchanged"
        )
    top = np.percentile(concentrate(od, matrix), 99, axis=0)
    if not top.min() >= _FAINTEST:
        name = ("haematoxylin", "eosin")[int(np.argmin(top))]
        raise SlideError(
            f"stain: hardly any {name} (99 % of tissue below {top.min():.3f}): give a larger part of the slide with "
            "nuclei and stroma, or leave this slide unchanged"
        )
    return Stains(matrix, top, white)


def concentrations(image: np.ndarray, stains: Stains) -> np.ndarray:
    """How much of each stain a pixel holds, float32 (..., 2), by least squares; of uint8 (..., 3)."""
    return least_squares(density(image, stains.white), stains.matrix)


def transfer(image: np.ndarray, source: Stains, target: Stains) -> np.ndarray:
    """The image as if it had the target's stains: concentrations by least squares, scaled to the target's top.

    What lies off the plane of the two stains (pen, pigment) is dropped, as in the paper. Concentrations may be
    negative, so that glass brighter than `white` stays glass.

    Args:
        image: uint8 (h, w, 3) or (n, h, w, 3), of the slide that `source` was estimated on.
        source: its stains.
        target: those to have.

    Returns:
        uint8, of the image's shape.

    Raises:
        SlideError: no uint8 RGB.
    """
    matrix = np.linalg.pinv(source.matrix) @ np.diag(target.top / source.top) @ target.matrix
    return recolour(image, matrix, white=source.white, new_white=target.white)
