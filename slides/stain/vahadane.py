"""Stain vectors as the two atoms that explain the tissue with the fewest and least concentrations.

Vahadane et al., "Structure-preserving color normalization and sparse stain separation for histological images", IEEE
TMI 2016:  min over W, H >= 0, |W_j| <= 1  of  1/2 |V - W H|^2 + lambda |H|_1,  V the optical densities.

Solved by turns, as in online dictionary learning (Mairal et al. 2009) but with all pixels at each step: with two atoms
the non-negative lasso has a closed form, so nothing is iterated a pixel (scikit-learn's DictionaryLearning comes to the
same optimum, at a few hundred times the cost). It starts from Ruifrok's vectors: no random numbers, one answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slides.errors import SlideError
from slides.stain.hed import RUIFROK
from slides.stain.od import BETA, WHITE, White, density, pixels_of, tissue_pixels
from slides.stain.stains import Stains, stains_of

_BLOCK = 1 << 16  # pixels at a time


@dataclass(frozen=True)
class Vahadane:
    """Vahadane's method.

    Args:
        sparsity: the paper's lambda.
        beta: lowest mean optical density of tissue.
        white: grey value of the bare glass, or three (see `slides.stain.od`).
        most: pixels that are looked at.
    """

    sparsity: float = 0.1
    beta: float = BETA
    white: White = WHITE
    most: int = 100_000

    def __post_init__(self) -> None:
        if not self.sparsity >= 0:
            raise SlideError(f"stain: sparsity is {self.sparsity}, a number from 0 (usually 0.1)")

    def estimate(self, pixels: np.ndarray) -> Stains:
        """The stains of a slide, from an overview or some of its patches: uint8 (..., 3).

        Raises:
            SlideError: no uint8 RGB, too little tissue, or one colour only.
        """
        tissue = tissue_pixels(pixels, white=self.white, beta=self.beta)
        if len(tissue) > self.most:
            tissue = tissue[np.random.default_rng(0).integers(0, len(tissue), self.most)]
        od = density(tissue, self.white).astype(np.float64)
        return stains_of(dictionary(od, self.sparsity), od, self.white, nonnegative)

    def transfer(self, image: np.ndarray, source: Stains, target: Stains) -> np.ndarray:
        """The image as if it had the target's stains; uint8 (..., 3) in and out.

        Concentrations are not negative, as in the paper (so whatever is brighter than the glass becomes glass), but no
        sparsity is asked of them here: it would take `sparsity` off each, and a slide would not keep its own colours.

        Raises:
            SlideError: no uint8 RGB.
        """
        pixels = pixels_of(image)
        out = np.empty(pixels.shape, np.uint8)
        mix = (np.diag(target.top / source.top) @ target.matrix).astype(np.float32)
        white = np.broadcast_to(target.white, 3).astype(np.float32)
        for start in range(0, len(pixels), _BLOCK):
            codes = nonnegative(density(pixels[start : start + _BLOCK], source.white), source.matrix)
            out[start : start + _BLOCK] = np.rint(white * np.exp(-codes @ mix))
        return out.reshape(image.shape)


def nonnegative(od: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Concentrations, (n, 2), not negative, of densities (n, 3) by least squares."""
    return sparse_codes(od, matrix.astype(od.dtype), 0.0)


def dictionary(od: np.ndarray, sparsity: float, steps: int = 500) -> np.ndarray:
    """The two atoms, (2, 3), not negative and at most of length 1, of densities (n, 3)."""
    atoms = RUIFROK[:2] / np.linalg.norm(RUIFROK[:2], axis=1, keepdims=True)
    for _ in range(steps):
        codes = sparse_codes(od, atoms, sparsity)
        # Mairal's block coordinate descent needs the codes only through these two products.
        gram, mixed = codes.T @ codes, codes.T @ od
        before = atoms.copy()
        for j in (0, 1, 0, 1):
            if gram[j, j] > 0:
                atom = np.maximum(atoms[j] + (mixed[j] - gram[j] @ atoms) / gram[j, j], 0)
                atoms[j] = atom / max(float(np.linalg.norm(atom)), 1.0)
        if np.abs(atoms - before).max() < 1e-6:
            break
    return atoms


def sparse_codes(od: np.ndarray, atoms: np.ndarray, sparsity: float) -> np.ndarray:
    """argmin over c >= 0 of 1/2 |v - c @ atoms|^2 + sparsity |c|_1 for each row v of (n, 3); (n, 2), exact.

    Either both concentrations are positive and solve the 2 x 2 system, or the better of the two alone is there.
    """
    gram = atoms @ atoms.T
    drive = od @ atoms.T - sparsity
    alone = np.maximum(drive, 0) / np.maximum(np.diag(gram), 1e-12)
    gain = alone * np.maximum(drive, 0)
    alone[np.arange(len(od)), gain.argmin(1)] = 0
    determinant = gram[0, 0] * gram[1, 1] - gram[0, 1] ** 2
    if determinant < 1e-9:
        return alone
    adjugate = np.array([[gram[1, 1], -gram[0, 1]], [-gram[0, 1], gram[0, 0]]], od.dtype)
    both = drive @ (adjugate / determinant)
    return np.where((both >= 0).all(1, keepdims=True), both, alone)
