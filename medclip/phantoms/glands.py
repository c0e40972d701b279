"""Gland cross-sections: closed contours r(theta) around scattered centres, each with a lumen.

A contour is R (1 + sum_k a_k cos(k theta + phi_k)), k = 2..4, evaluated without trigonometry as the real part of powers
of the unit complex number z / |z|.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from medclip.phantoms.noise import GRID, grid_axes, lattice

Complex = NDArray[np.complexfloating]
_HARMONICS = np.arange(2, 5)
_COARSE = GRID // 2  # contours are smooth: half the usual grid is enough


@dataclass
class Glands:
    """Glands of one field: distances (GRID, GRID) positive inside, in micrometres, and the contours behind them."""

    um: float
    wall: np.ndarray  # to the outer wall of the nearest gland
    lumen: np.ndarray  # to the lumen's edge
    each: np.ndarray  # (n, GRID / 2, GRID / 2) wall distance of every gland
    each_lumen: np.ndarray  # the same for the lumens
    centres: np.ndarray  # (n, 2)
    radius: np.ndarray  # (n,)
    shape: Complex  # (n, 3) Fourier coefficients of the wall

    def structures(self) -> list[tuple[str, np.ndarray]]:
        """Named stacks of distance fields: every gland, and its lumen."""
        return [("gland", self.each), ("lumen", np.minimum(self.each, self.each_lumen))]

    def ring(
        self, rng: np.random.Generator, inset: float, spacing: float, stagger: float = 0.8
    ) -> tuple[np.ndarray, np.ndarray]:
        """Points (n, 2) `spacing` apart on contours `inset` inside every wall, in and out by up to `stagger`.

        Also their outward directions (n,).
        """
        points: list[np.ndarray] = [np.empty((0, 2), np.float32)]
        directions: list[np.ndarray] = [np.empty(0, np.float32)]
        for centre, radius, shape in zip(self.centres, self.radius, self.shape, strict=True):
            count = max(int(2 * np.pi * (radius - inset) / spacing), 4)
            theta = (np.arange(count) + rng.uniform(-0.15, 0.15, count)) * (2 * np.pi / count)
            unit: Complex = np.exp(1j * theta)
            reach = _contour(_powers(unit), np.asarray(radius), shape) - inset + rng.uniform(-stagger, stagger, count)
            points.append(centre + np.stack([reach * unit.real, reach * unit.imag], 1))
            directions.append(theta)
        return np.concatenate(points).astype(np.float32), np.concatenate(directions).astype(np.float32)


def _powers(unit: Complex) -> list[Complex]:
    """Powers 2, 3, 4 of unit complex numbers: cos and sin of the harmonics."""
    square = unit * unit
    return [square, square * unit, square * square]


def _contour(powers: list[Complex], radius: np.ndarray, shape: Complex) -> np.ndarray:
    """Contour radius for `_powers` of the direction; `radius` and `shape` (..., 3) broadcast against the powers."""
    total = np.ones(powers[0].shape, np.float32)
    for k, power in enumerate(powers):
        total += power.real * shape[..., k].real - power.imag * shape[..., k].imag
    return radius * total


def grow_glands(
    rng: np.random.Generator, um: float, *, spacing: float, radius: float, lumen: float, uneven: float
) -> Glands:
    """Glands `spacing` apart with mean `radius`, lumens of `lumen` times that, contours `uneven` (0 = round)."""
    centres = lattice(rng, spacing, um, 0.16).reshape(-1, 2)
    sizes = radius * np.exp(rng.normal(0, 0.5 * uneven + 0.05, len(centres)))
    walls = _coefficients(rng, len(centres), uneven)
    hollows = _coefficients(rng, len(centres), 2.2 * uneven)
    near = ((centres > -1.3 * radius) & (centres < um + 1.3 * radius)).all(1)
    centres, sizes, walls, hollows = centres[near], sizes[near], walls[near], hollows[near]
    x, y = grid_axes(um, _COARSE)
    z = ((x - centres[:, :1, None]) + 1j * (y - centres[:, 1:, None])).astype(np.complex64)
    away = np.abs(z) + np.float32(1e-3)
    unit = z / away
    powers = _powers(unit)
    sizes = sizes.astype(np.float32)
    each = _contour(powers, sizes[:, None, None], walls[:, None, None]) - away
    hollow = _contour(powers, np.float32(lumen) * sizes[:, None, None], hollows[:, None, None]) - away
    wall, inner = (cv2.resize(f.max(0), (GRID, GRID), interpolation=cv2.INTER_CUBIC) for f in (each, hollow))
    return Glands(um, wall, inner, each, hollow, centres, sizes, walls)


def _coefficients(rng: np.random.Generator, count: int, uneven: float) -> Complex:
    noise = rng.standard_normal((2, count, len(_HARMONICS))) * uneven * (2 / _HARMONICS)
    return (noise[0] + 1j * noise[1]).astype(np.complex64)
