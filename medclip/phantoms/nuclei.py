"""Nuclei as soft ellipses of hematoxylin, all of a field drawn at once.

A nucleus has an elliptic radius q (0 at its centre, 1 at its membrane), an outline rippled by q^3 cos 3 theta, an
optical density and a paler centre (`vesicle`: open chromatin under a dark membrane); a nucleolus is a small nucleus on
top. Nuclei of similar size share one stack of patches; everything is merged into the canvas by maximum, which does not
depend on the order.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

_STEPS = np.asarray([1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 17, 20, 25, 30, 40, 60, 90, 130, 200, 300, 450, 700])
_STACK = 65536  # pixels of a stack of patches: a few such arrays fit the cache


@dataclass
class Nuclei:
    """Columns (n,) float32: position and semi-axes in micrometres, angle in radians, densities in OD."""

    x: np.ndarray
    y: np.ndarray
    a: np.ndarray
    b: np.ndarray
    angle: np.ndarray
    density: np.ndarray
    vesicle: np.ndarray
    ripple: np.ndarray

    def __len__(self) -> int:
        return len(self.x)

    def take(self, which: np.ndarray) -> Nuclei:
        """Those nuclei selected by a mask or by indices."""
        return Nuclei(*(getattr(self, column.name)[which] for column in fields(self)))

    @staticmethod
    def join(*groups: Nuclei) -> Nuclei:
        """Several populations as one."""
        return Nuclei(*(np.concatenate([getattr(g, column.name) for g in groups]) for column in fields(Nuclei)))


def population(
    rng: np.random.Generator,
    xy: np.ndarray,
    *,
    a: float,
    ratio: float = 1.0,
    spread: float = 0.1,
    density: float = 0.6,
    angle: np.ndarray | None = None,
    turn: float = 0.2,
    vesicle: float = 0.2,
    ripple: float = 0.0,
) -> Nuclei:
    """Nuclei at points (n, 2) micrometres: long semi-axis `a`, `ratio` short/long, log-normal `spread` of both.

    `angle` (n,) is the direction of the long axis, random where None; `turn` (radians) disturbs it.
    """
    n = len(xy)
    noise = rng.standard_normal((5, n), dtype=np.float32)
    long = a * np.exp(spread * noise[0])
    short = np.minimum(long * ratio * np.exp(0.6 * spread * noise[1]), long)
    direction = np.pi * noise[2] if angle is None else angle + turn * noise[2]
    ones = np.ones(n, np.float32)
    return Nuclei(
        *(
            np.asarray(column, np.float32)
            for column in (
                xy[:, 0],
                xy[:, 1],
                long,
                short,
                direction,
                density * np.clip(1 + 0.8 * (spread + 0.08) * noise[3], 0.5, 1.6),
                vesicle * ones,
                np.clip(ripple * noise[4], -0.3, 0.3),
            )
        )
    )


def nucleoli(nuclei: Nuclei, density: float = 1.5) -> Nuclei:
    """One nucleolus a nucleus: a small dark round spot a little off the centre, `density` times as dark."""
    shift = 0.22 * nuclei.a
    radius = 0.27 * nuclei.b
    flat = np.zeros_like(radius)
    return Nuclei(
        nuclei.x + shift * np.cos(nuclei.angle),
        nuclei.y + shift * np.sin(nuclei.angle),
        radius,
        radius,
        flat,
        density * nuclei.density,
        flat,
        flat,
    )


def reach(nuclei: Nuclei, scale: np.float32) -> np.ndarray:
    """Half width (n,) in whole pixels of a square around each nucleus and its soft edge, for `scale` pixels a um."""
    soft = 0.5 * (1 + 0.25 * scale) * nuclei.a / nuclei.b
    bulge = 1 + np.abs(nuclei.ripple)
    return np.ceil(nuclei.a * scale * bulge + np.minimum(soft, 3) + 0.5).astype(np.intp)


def draw_nuclei(nuclei: Nuclei, um: float, size: int) -> np.ndarray:
    """Hematoxylin OD (size, size), float32, of all nuclei in a field `um` micrometres wide."""
    scale = np.float32(size / um)
    extent = reach(nuclei, scale)
    seen = (nuclei.x * scale > -extent) & (nuclei.x * scale < size + extent)
    seen &= (nuclei.y * scale > -extent) & (nuclei.y * scale < size + extent)
    nuclei, extent = nuclei.take(seen), _STEPS[np.searchsorted(_STEPS, extent[seen])]
    if not len(nuclei):
        return np.zeros((size, size), np.float32)
    pad = 2 * int(extent.max()) + 2
    width = size + 2 * pad
    density = np.zeros(width * width, np.float32)
    for step in np.unique(extent).tolist():
        members = np.flatnonzero(extent == step)
        stack = max(_STACK // (2 * step + 1) ** 2, 1)
        for start in range(0, len(members), stack):
            value, where = _patches(nuclei.take(members[start : start + stack]), step, scale, pad, width)
            np.maximum.at(density, where, value)
    return density.reshape(width, width)[pad : pad + size, pad : pad + size]


def _patches(n: Nuclei, step: int, scale: np.float32, pad: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Density and flat canvas position of every pixel in these nuclei, drawn on (n, k, k) patches around them."""
    px, py = n.x * scale - np.float32(0.5), n.y * scale - np.float32(0.5)
    column, row = np.rint(px), np.rint(py)
    offset = np.arange(-step, step + 1, dtype=np.float32)
    dx, dy = (column - px)[:, None] + offset, (row - py)[:, None] + offset  # (n, k)
    cos, sin = np.cos(n.angle)[:, None], np.sin(n.angle)[:, None]
    a, b = (n.a * scale)[:, None], (n.b * scale)[:, None]
    # the rotated coordinates are sums of a row and a column term; passes in place keep the stack in the cache
    u = (sin / a * dy)[:, :, None] + (cos / a * dx)[:, None, :]
    v = (cos / b * dy)[:, :, None] - (sin / b * dx)[:, None, :]
    v *= v
    square = u * u
    lobes = n.ripple.any()
    if lobes:  # u^3 - 3 u v^2 = q^3 cos(3 theta): a three-lobed outline
        v *= 3
        u *= square - v
        v *= np.float32(1 / 3)
    square += v
    cover = np.sqrt(square)
    if lobes:
        u *= n.ripple[:, None, None]
        u /= np.maximum(square, 1)  # outside, the cube would outgrow the radius and draw ghosts
        cover += u
    np.subtract(1, cover, out=cover)
    cover *= (n.b * scale / (1 + np.float32(0.25) * scale))[:, None, None]
    cover += np.float32(0.5)
    np.clip(cover, 0, 1, out=cover)
    np.minimum(square, 1, out=square)
    square *= (n.vesicle * n.density)[:, None, None]
    square += ((1 - n.vesicle) * n.density)[:, None, None]
    square *= cover
    inside = np.flatnonzero(cover)
    corner = (row.astype(np.int32) + (pad - step)) * width + column.astype(np.int32) + (pad - step)
    within = np.arange(2 * step + 1, dtype=np.int32)
    where = (corner[:, None] + within * width)[:, :, None] + within
    return square.ravel()[inside], where.ravel()[inside]
