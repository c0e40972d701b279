"""Tissue whose stains are known: Beer-Lambert's law run forwards."""

from __future__ import annotations

import numpy as np

# Published pairs of haematoxylin and eosin: Ruifrok & Johnston 2001; the reference of Veta's normalisation code;
# ImageJ's colour deconvolution ("H&E"); and a bluish pair of our own.
PAIRS = {
    "ruifrok": [[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]],
    "veta": [[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]],
    "imagej": [[0.644211, 0.716556, 0.266844], [0.092789, 0.954111, 0.283111]],
    "bluish": [[0.55, 0.78, 0.30], [0.12, 0.90, 0.42]],
}


def unit(vectors: object) -> np.ndarray:
    rows = np.asarray(vectors, np.float64)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def angles(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Degrees between rows."""
    return np.degrees(np.arccos(np.clip((unit(a) * unit(b)).sum(-1), -1, 1)))


def tissue(
    pair: str, *, glass: float = 0.5, noise: float = 1.0, n: int = 100_000, white: object = 240.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """uint8 pixels (n, 3), true unit vectors (2, 3), and concentrations (k, 2) of those that are no glass.

    Nuclei are mostly haematoxylin, stroma is mostly eosin, some pixels are one of them alone; glass is peppered in.
    """
    rng = np.random.default_rng(seed)
    matrix = unit(PAIRS[pair])
    nucleus = rng.random((n, 1)) < 0.4
    amounts = np.where(nucleus, rng.gamma([8.0, 1.0], 0.15, (n, 2)), rng.gamma([0.6, 5.0], [0.08, 0.15], (n, 2)))
    alone = rng.random(n)
    amounts[alone < 0.05, 1] = 0
    amounts[alone > 0.93, 0] = 0
    is_glass = rng.random(n) < glass
    amounts[is_glass] = 0
    light = np.broadcast_to(np.asarray(white, np.float64), 3) * np.exp(-amounts @ matrix) + rng.normal(0, noise, (n, 3))
    return np.clip(np.rint(light), 0, 255).astype(np.uint8), matrix, amounts[~is_glass]
