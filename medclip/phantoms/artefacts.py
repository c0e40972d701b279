"""What goes wrong between block and scanner: folds, bubbles, pen and lost focus.

A fold doubles the section, so it multiplies stain; a bubble bleaches and rings; ink adds its own optical density to
the light; blur acts on the light. Each returns the coverage it touched, as a coarse distance positive inside.
"""

from __future__ import annotations

import cv2
import numpy as np

from medclip.phantoms.noise import GRID, enlarge, ramp, smooth

ARTEFACTS = ("fold", "blur", "pen", "bubble")
_INKS = np.asarray([(0.9, 0.25, 0.55), (0.95, 0.55, 0.10), (0.8, 0.8, 0.75)], np.float32)  # green, blue, black: OD


def region(rng: np.random.Generator, artefact: str) -> np.ndarray:
    """Where the artefact is: distance (GRID, GRID) in field widths, positive inside."""
    axis = (np.arange(GRID, dtype=np.float32) + 0.5) / GRID - 0.5
    x, y = axis[None, :], axis[:, None]
    angle, shift = rng.uniform(0, np.pi), rng.uniform(-0.25, 0.25)
    if artefact == "blur":
        return np.ones((GRID, GRID), np.float32)
    if artefact == "bubble":
        cx, cy, radius = *rng.uniform(-0.25, 0.25, 2), rng.uniform(0.2, 0.33)
        return (radius - np.hypot(x - cx, y - cy)).astype(np.float32)
    bend = 0.05 * smooth(rng, 3)
    half = rng.uniform(0.035, 0.06) if artefact == "fold" else rng.uniform(0.06, 0.10)
    return (half - np.abs(np.cos(angle) * x + np.sin(angle) * y + shift + bend)).astype(np.float32)


def spoil_stain(artefact: str, where: np.ndarray, hematoxylin: np.ndarray, eosin: np.ndarray) -> None:
    """Apply a fold or bubble to the stain densities (h, w), in place."""
    if artefact == "fold":
        factor = 1 + 1.1 * ramp(enlarge(where, len(eosin)), 0.012)
    elif artefact == "bubble":
        depth = enlarge(where, len(eosin))
        rim = np.exp(-((depth / 0.012) ** 2))
        factor = 1 - 0.6 * ramp(depth, 0.01) + 1.3 * rim
        eosin += 0.12 * rim
        hematoxylin += 0.22 * rim
    else:
        return
    hematoxylin *= factor
    eosin *= factor


def spoil_light(artefact: str, where: np.ndarray, light: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Apply pen or blur to the transmitted light (h, w, 3)."""
    ink, sigma = _INKS[rng.integers(len(_INKS))], rng.uniform(1.6, 2.6) * len(light) / 224
    if artefact == "pen":
        cover = ramp(enlarge(where, len(light)), 0.02) * rng.uniform(0.75, 1.0)
        light *= cv2.merge([cv2.exp(cover * (-np.log(10) * od)) for od in ink.tolist()])
    elif artefact == "blur":
        light = cv2.GaussianBlur(light, (0, 0), sigma)
    return light
