"""Colour deconvolution with fixed vectors, and jitter of the stains that it finds.

Ruifrok & Johnston, "Quantification of histochemical staining by color deconvolution", 2001: haematoxylin, eosin and
DAB, with the figures (not scaled to length 1) that scikit-image's `rgb2hed` has. Tellez et al., "Whole-slide mitosis
detection in H&E breast histology using PHH3 as a reference", IEEE TMI 2018: each concentration s becomes a s + b, with
a and b drawn from [1 - sigma, 1 + sigma] and [-sigma, sigma].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slides.errors import SlideError
from slides.stain.od import recolour

RUIFROK = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
_DECONVOLVE = np.linalg.inv(RUIFROK)


@dataclass(frozen=True)
class HedJitter:
    """Random strength of the stains, for training. Concentrations are -ln(I / 255) @ RUIFROK^-1.

    scikit-image since 0.18 divides them by ln(10^6) = 13.8: a `shift` of 0.05 there is one of 0.69 here.

    Args:
        scale: sigma of the factor a; 0.05 is Tellez's light jitter, 0.2 the strong one.
        shift: sigma of the offset b.
    """

    scale: float = 0.05
    shift: float = 0.05

    def __post_init__(self) -> None:
        if not (0 <= self.scale < 1 and 0 <= self.shift < np.inf):
            raise SlideError(
                f"stain: jitter of scale {self.scale} and shift {self.shift}: give 0 to below 1, and 0 or more"
            )

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One draw for all of the image or batch, uint8 (..., 3).

        Raises:
            SlideError: no uint8 RGB.
        """
        factors = rng.uniform(1 - self.scale, 1 + self.scale, 3)
        return restain(image, factors, rng.uniform(-self.shift, self.shift, 3))


def restain(image: np.ndarray, factors: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """The image whose haematoxylin, eosin and DAB s are `factors` * s + `shifts`. Negative s stay: nothing is lost."""
    return recolour(image, _DECONVOLVE @ np.diag(factors) @ RUIFROK, shifts @ RUIFROK, white=255.0)
