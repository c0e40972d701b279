"""Textures and point patterns: cheap because they are cut from one bank of noise or made on a coarse grid.

Everything that has a physical size is drawn on a `GRID` x `GRID` raster over the field and enlarged, so the same seed
shows the same scene at every image size; only film grain lives on the pixels.
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np

GRID = 112  # half the usual 224 pixels: region borders stay sharp because distances, not masks, are enlarged
_BANK = 2048


@lru_cache(maxsize=4)
def bank(sigma: float = 0.0) -> np.ndarray:
    """Periodic unit-variance Gaussian noise, float32 (2048, 2048), smoothed by `sigma` pixels; read-only."""
    noise = np.random.default_rng(20250107).standard_normal((_BANK, _BANK), dtype=np.float32)
    if sigma:
        margin = int(4 * sigma) + 1
        noise = cv2.GaussianBlur(np.pad(noise, margin, mode="wrap"), (0, 0), sigma)[margin:-margin, margin:-margin]
        noise = noise / noise.std()
    noise = np.ascontiguousarray(noise, np.float32)
    noise.setflags(write=False)
    return noise


def grain(rng: np.random.Generator, size: int, sigma: float = 0.0) -> np.ndarray:
    """Pixel noise (size, size): a random window of the bank."""
    y, x = rng.integers(0, _BANK - 1024, 2)
    return bank(sigma)[y : y + size, x : x + size]


def texture(rng: np.random.Generator, size: int, pixels: float, sigma: float = 1.0) -> np.ndarray:
    """Noise (size, size) whose structure is fixed to the scene: `pixels` of the bank span the image (at most 1024)."""
    y, x = rng.integers(0, _BANK - 1024, 2)
    span = min(max(round(pixels), 8), 1024)
    return enlarge(bank(sigma)[y : y + span, x : x + span], size)


def smooth(rng: np.random.Generator, waves: float) -> np.ndarray:
    """Smooth noise (GRID, GRID) of about unit variance with `waves` bumps across the field."""
    cells = max(round(waves), 3)
    coarse = rng.standard_normal((cells + 1, cells + 1), dtype=np.float32)
    full = round(GRID * (cells + 1) / cells)
    margin = (full - GRID) // 2
    fine = cv2.resize(coarse * np.float32(1.4), (full, full), interpolation=cv2.INTER_CUBIC)
    return fine[margin : margin + GRID, margin : margin + GRID]


def enlarge(field: np.ndarray, size: int) -> np.ndarray:
    """Resample a square field to (size, size)."""
    return cv2.resize(np.asarray(field, np.float32), (size, size), interpolation=cv2.INTER_LINEAR)


def ramp(distance: np.ndarray, width: float) -> np.ndarray:
    """0 outside, 1 inside a signed distance, linear over `width` around 0."""
    return np.clip(distance * np.float32(1 / width) + np.float32(0.5), 0, 1)


def grid_axes(um: float, cells: int = GRID) -> tuple[np.ndarray, np.ndarray]:
    """Broadcastable x (1, cells) and y (cells, 1) of a coarse grid's pixel centres, in the unit of `um`."""
    axis = ((np.arange(cells, dtype=np.float32) + 0.5) * (um / cells)).astype(np.float32)
    return axis[None, :], axis[:, None]


def lookup(field: np.ndarray, xy: np.ndarray, um: float) -> np.ndarray:
    """Values of a coarse field at points (n, 2) in micrometres; points outside take the border's value."""
    cell = np.clip((xy * (field.shape[0] / um)).astype(np.intp), 0, field.shape[0] - 1)
    return field[cell[:, 1], cell[:, 0]]


def lattice(rng: np.random.Generator, spacing: float, um: float, jitter: float = 0.3) -> np.ndarray:
    """Points (rows, columns, 2) of a jittered brick lattice over the field and a margin of two cells, in micrometres.

    Spreads points evenly without overlap, as cells in tissue do.
    """
    count = int(np.ceil(um / spacing)) + 5
    points = rng.random((count, count, 2), dtype=np.float32)
    points -= 0.5
    points *= np.float32(2 * jitter * spacing)
    start = spacing * (rng.random(2, dtype=np.float32) - np.float32(2.5))
    index = np.float32(spacing) * np.arange(count, dtype=np.float32)
    points[..., 0] += index + start[0]
    points[..., 1] += index[:, None] + start[1]
    points[1::2, :, 0] += np.float32(0.5 * spacing)
    return points


def cell_borders(points: np.ndarray, spacing: float, um: float) -> np.ndarray:
    """Distance (GRID, GRID) to the border between the cells around the points of a `lattice`, in micrometres.

    Worley's cellular noise: half the gap between the nearest and the second-nearest point, sought among the lattice
    neighbours only.
    """
    x, y = grid_axes(um)
    count = len(points)
    index = np.arange(count)
    start_x = float((points[::2, :, 0] / spacing - index).mean())
    start_y = float((points[:, :, 1] / spacing - index[:, None]).mean())
    row = np.rint(y / spacing - start_y)
    column = np.rint(x / spacing - start_x - 0.5 * (row % 2))
    here = (row * count + column).astype(np.intp)
    px, py = np.ascontiguousarray(points[..., 0]).ravel(), np.ascontiguousarray(points[..., 1]).ravel()
    nearest = np.full((GRID, GRID), np.inf, np.float32)
    second = nearest.copy()
    for step in (-count - 1, -count, -count + 1, -1, 0, 1, count - 1, count, count + 1):
        dx, dy = px[here + step] - x, py[here + step] - y
        gap = dx * dx + dy * dy
        np.minimum(second, np.maximum(nearest, gap), out=second)
        np.minimum(nearest, gap, out=nearest)
    return 0.5 * (np.sqrt(second) - np.sqrt(nearest))


def streaks(
    rng: np.random.Generator, um: float, size: int, angle: float, wave: float, length: float = 30.0, width: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Fibre texture (size, size) of unit variance and its local direction (GRID, GRID) in radians.

    The bank is stretched to `length` micrometres along the fibres and `width` across them; `wave` (micrometres) bends
    the fibres.
    """
    x, y = grid_axes(um)
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    bend = wave * smooth(rng, um / 45) + 0.25 * wave * smooth(rng, um / 16)
    across = cos * y - sin * x + bend
    along = cos * x + sin * y
    start = rng.uniform(0, _BANK, 2).tolist()
    maps = cv2.merge([along / length + start[0], across / width + start[1]])
    bank_x, bank_y = cv2.split(cv2.resize(maps, (size, size)))
    fibre = cv2.remap(bank(1.0), bank_x, bank_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    slope_y, slope_x = np.gradient(across)
    return fibre, np.arctan2(slope_y, slope_x) - np.pi / 2
