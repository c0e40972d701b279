"""Mean and spread of colour, matched in Lab.

Reinhard et al., "Color transfer between images", 2001; in CIE Lab where they have Ruderman's l alpha beta, as is usual
in histology, and on the pixels that are tissue, so that the share of glass says nothing. Glass keeps its colour:
between no density and `beta` the change fades in, without an edge.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from slides.errors import SlideError
from slides.stain.od import BETA, WHITE, White, density, pixels_of, tissue_pixels

_FLATTEST = 0.1  # Lab units of spread: less is one colour, and what is divided by it only noise
_BLOCK = 1 << 16  # pixels at a time
_SRGB = np.arange(256) / 255
_LINEAR = np.where(_SRGB <= 0.04045, _SRGB / 12.92, ((_SRGB + 0.055) / 1.055) ** 2.4).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Colours:
    """Mean and standard deviation, (3,) each, of tissue in CIE Lab (L from 0 to 100)."""

    mean: np.ndarray
    std: np.ndarray


@dataclass(frozen=True)
class Reinhard:
    """Reinhard's method.

    Args:
        beta: lowest mean optical density of tissue.
        white: grey value of the bare glass, or three (see `slides.stain.od`).
    """

    beta: float = BETA
    white: White = WHITE

    def estimate(self, pixels: np.ndarray) -> Colours:
        """The colours of a slide, from an overview or some of its patches: uint8 (..., 3).

        Raises:
            SlideError: no uint8 RGB, too little tissue, or one colour only.
        """
        tissue = tissue_pixels(pixels, white=self.white, beta=self.beta)
        lab = _lab(tissue).astype(np.float64)
        mean, std = lab.mean(0), lab.std(0)
        if std.min() < _FLATTEST:
            raise SlideError(
                f"stain: the tissue has one colour only (spread in Lab {', '.join(f'{s:.2f}' for s in std)}): give a "
                "larger part of the slide, or leave this slide (grey?) unchanged"
            )
        return Colours(mean, std)

    def transfer(self, image: np.ndarray, source: Colours, target: Colours) -> np.ndarray:
        """The image, uint8 (..., 3), with the target's mean and spread of each Lab channel; uint8 of its shape.

        Raises:
            SlideError: no uint8 RGB.
        """
        pixels = pixels_of(image)
        out = np.empty(pixels.shape, np.uint8)
        factor = (target.std / source.std).astype(np.float32)
        shift = (target.mean - source.mean * factor).astype(np.float32)
        for start in range(0, len(pixels), _BLOCK):
            block = pixels[start : start + _BLOCK]
            rgb = block * np.float32(1 / 255)
            changed = cv2.cvtColor((_lab(block) * factor + shift)[:, None], cv2.COLOR_LAB2RGB)[:, 0]
            # 0 on glass, 1 on tissue.
            weight = np.clip(density(block, self.white).mean(-1, keepdims=True) / self.beta, 0, 1)
            out[start : start + _BLOCK] = np.rint(np.clip(rgb + weight * (changed - rgb), 0, 1) * 255)
        return out.reshape(image.shape)


def _lab(pixels: np.ndarray) -> np.ndarray:
    # OpenCV's COLOR_RGB2LAB interpolates in a coarse table (off by up to 0.4); from linear light it computes.
    return cv2.cvtColor(_LINEAR[pixels][:, None], cv2.COLOR_LRGB2LAB)[:, 0]
