"""Stain vectors as the edges of the cloud of tissue colours.

Macenko et al., "A method for normalizing histology slides for quantitative analysis", ISBI 2009: the plane of the two
largest singular vectors of the optical densities, in it the robust extremes (percentiles `alpha` and 100 - `alpha`) of
the angle. As in the paper the plane goes through the origin (no stain, no density); the code that most people use takes
the covariance instead, whose plane goes through the mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slides.errors import SlideError
from slides.stain.od import BETA, WHITE, White, density, tissue_pixels
from slides.stain.stains import Stains, stains_of, transfer


@dataclass(frozen=True)
class Macenko:
    """Macenko's estimate.

    Args:
        alpha: percentile of the angle that counts as its extreme.
        beta: lowest mean optical density of tissue.
        white: grey value of the bare glass, or three (see `slides.stain.od`).
    """

    alpha: float = 1.0
    beta: float = BETA
    white: White = WHITE

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < 50:
            raise SlideError(f"stain: alpha is {self.alpha}, a percentile from 0 to below 50 (usually 1)")

    def estimate(self, pixels: np.ndarray) -> Stains:
        """The stains of a slide, from an overview or some of its patches: uint8 (..., 3).

        Raises:
            SlideError: no uint8 RGB, too little tissue, or one colour only.
        """
        tissue = tissue_pixels(pixels, white=self.white, beta=self.beta)
        od = density(tissue, self.white).astype(np.float64)
        # Singular vectors of od, from the (3, 3) product: ascending, so the last two span the plane.
        _, vectors = np.linalg.eigh(od.T @ od)
        plane = vectors[:, [2, 1]]
        plane = plane * np.where(plane.sum(0) < 0, -1, 1)  # the first lies among the pixels: angles stay off the seam
        on_plane = od @ plane
        angle = np.arctan2(on_plane[:, 1], on_plane[:, 0])
        edges = np.percentile(angle, [self.alpha, 100 - self.alpha])
        extremes = np.stack([np.cos(edges), np.sin(edges)], 1) @ plane.T
        return stains_of(np.maximum(extremes, 0), od, self.white)

    def transfer(self, image: np.ndarray, source: Stains, target: Stains) -> np.ndarray:
        """`slides.stain.stains.transfer`."""
        return transfer(image, source, target)
