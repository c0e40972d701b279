"""The nuclei's brush as one would first write it: one nucleus at a time, straight from its definition."""

from __future__ import annotations

import numpy as np

from medclip.phantoms.nuclei import Nuclei


def draw_one_by_one(nuclei: Nuclei, um: float, size: int) -> np.ndarray:
    """Hematoxylin OD (size, size) of all nuclei in a field `um` micrometres wide."""
    canvas = np.zeros((size, size), np.float32)
    scale = size / um
    for i in range(len(nuclei)):
        a, b, ripple = float(nuclei.a[i]) * scale, float(nuclei.b[i]) * scale, float(nuclei.ripple[i])
        x, y = float(nuclei.x[i]) * scale - 0.5, float(nuclei.y[i]) * scale - 0.5
        edge = b / (1 + 0.25 * scale)  # how fast the cover falls with the radius
        far = a * (1 + 0.5 / edge) / (1 - abs(ripple))  # beyond it the cover is 0 whatever the direction
        left, right = max(int(np.floor(x - far)), 0), min(int(np.ceil(x + far)) + 1, size)
        top, bottom = max(int(np.floor(y - far)), 0), min(int(np.ceil(y + far)) + 1, size)
        if left >= right or top >= bottom:
            continue
        rows, columns = np.mgrid[top:bottom, left:right]
        dx, dy, angle = columns - x, rows - y, float(nuclei.angle[i])
        u = (np.cos(angle) * dx + np.sin(angle) * dy) / a
        v = (np.cos(angle) * dy - np.sin(angle) * dx) / b
        q = np.hypot(u, v)
        outline = q + ripple * np.cos(3 * np.arctan2(v, u)) * np.where(q < 1, q**3, q)
        cover = np.clip((1 - outline) * edge + 0.5, 0, 1)
        vesicle = float(nuclei.vesicle[i])
        od = float(nuclei.density[i]) * (1 - vesicle + vesicle * np.minimum(q, 1) ** 2) * cover
        window = canvas[top:bottom, left:right]
        np.maximum(window, od, out=window, casting="same_kind")
    return canvas
