"""From stain densities to scanner colours: the Beer-Lambert law, I = I0 * 10^-(M c).

`M` holds a stain's optical density per RGB channel. The vectors are published ones: Ruifrok & Johnston 2001
("Quantification of histochemical staining by color deconvolution"; also the re-measured H&E sets that ImageJ's Colour
Deconvolution ships, after Landini et al. 2021) and Macenko et al. 2009. A scanner is a set of vectors, a white point
and a gamma; a patient turns the vectors by a degree or two, as a staining batch does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType

import cv2
import numpy as np

_LN10 = math.log(10)


@dataclass(frozen=True)
class Scanner:
    """Stain vectors (hematoxylin, eosin) as OD in R, G, B; white point 0..255; display gamma; noise in grey levels."""

    vectors: tuple[tuple[float, float, float], tuple[float, float, float]]
    white: tuple[float, float, float]
    gamma: float
    noise: float


SCANNERS = MappingProxyType(
    {
        "ruifrok": Scanner(((0.650, 0.704, 0.286), (0.072, 0.990, 0.105)), (244, 243, 245), 1.00, 2.0),
        "imagej": Scanner(((0.644, 0.717, 0.267), (0.093, 0.954, 0.283)), (248, 244, 238), 1.08, 2.5),
        "landini": Scanner(((0.490, 0.769, 0.410), (0.046, 0.842, 0.537)), (240, 241, 246), 0.94, 3.0),
        "macenko": Scanner(((0.563, 0.720, 0.406), (0.216, 0.801, 0.558)), (251, 248, 250), 1.00, 1.5),
    }
)


def batch_vectors(scanner: Scanner, rng: np.random.Generator, degrees: float = 1.5) -> np.ndarray:
    """The scanner's stain vectors (2, 3), unit length, turned by about `degrees` for one staining batch."""
    vectors = np.asarray(scanner.vectors) + rng.normal(0, np.deg2rad(degrees) / np.sqrt(2), (2, 3))
    vectors = np.clip(vectors, 0.01, None)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def transmit(hematoxylin: np.ndarray, eosin: np.ndarray, vectors: np.ndarray, scanner: Scanner) -> np.ndarray:
    """Light that reaches the sensor, float32 (h, w, 3) in grey levels: Beer-Lambert on stain densities (h, w)."""
    planes = [
        cv2.exp(cv2.addWeighted(hematoxylin, -_LN10 * h, eosin, -_LN10 * e, math.log(white)))
        for h, e, white in zip(*vectors.tolist(), scanner.white, strict=True)
    ]
    return cv2.merge(planes)


def scan(light: np.ndarray, scanner: Scanner, noise: np.ndarray) -> np.ndarray:
    """The scanner's 8-bit picture (h, w, 3): sensor noise (h, w), then gamma, which scales all ODs alike."""
    noise = noise * np.float32(scanner.noise)
    pixels = cv2.add(light, cv2.merge([noise, noise, noise]), dtype=cv2.CV_8U)  # adds, rounds and saturates in one pass
    white = np.asarray(scanner.white)
    level = np.arange(256)[:, None]
    table = np.clip(white * (level / white) ** scanner.gamma + 0.5, 0, 255).astype(np.uint8)
    return cv2.LUT(pixels, table[None])
