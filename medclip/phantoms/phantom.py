"""One generated patient image with everything that is known about it, and the random streams it grows from.

A phantom is a function of (seed, kind, index) alone: what belongs to the image is drawn from the image's own stream,
what belongs to the patient (scanner, stain, body) from the patient's, so batches may be cut anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

Box = tuple[str, int, int, int, int]
KINDS = ("histology", "xray")
MIN_SIZE, MAX_SIZE = 64, 1024


@dataclass(frozen=True)
class Phantom:
    """A generated image and its truth.

    `attributes` are the facts that every caption states, plus the physical quantities behind them. `boxes` are
    (name, x0, y0, x1, y1) in pixels, half-open. `masks` (name -> bool (h, w)) are filled on request only.
    """

    image: np.ndarray  # uint8 (h, w, 3) RGB
    label: str
    attributes: dict[str, Any]
    captions: list[str]
    patient: str
    kind: str
    index: int
    boxes: list[Box] = field(default_factory=list)
    masks: dict[str, np.ndarray] = field(default_factory=dict)


def image_stream(kind: str, seed: int, index: int) -> np.random.Generator:
    """Random numbers that belong to one image."""
    return np.random.default_rng([seed, KINDS.index(kind), 0, index])


def patient_stream(kind: str, seed: int, patient: int) -> np.random.Generator:
    """Random numbers shared by all images of one patient."""
    return np.random.default_rng([seed, KINDS.index(kind), 1, patient])


def patient_name(kind: str, seed: int, patient: int) -> str:
    """An identifier that differs between kinds, seeds and patients, so that sets of several seeds can be mixed."""
    return f"{kind}-{seed}-{patient:05d}"


@lru_cache(maxsize=64)
def _interpolation(cells: int, size: int) -> np.ndarray:
    """Matrix (cells, size) that enlarges a row of `cells` values linearly to `size` pixels, as `cv2.resize` does."""
    at = (np.arange(size) + 0.5) * (cells / size) - 0.5
    return np.stack([np.interp(at, np.arange(cells), row) for row in np.eye(cells)]).astype(np.float32)


def region_boxes(name: str, distances: np.ndarray, size: int) -> list[Box]:
    """Boxes around the positive parts of coarse distance fields (n, g, g) as enlarged to `size`; none for an empty one.

    Works on the fields' projections, since linear interpolation of a maximum bounds the maximum of interpolations:
    a box holds every pixel of the enlarged region without enlarging it. Round regions fit tightly; `mask_box` is exact.
    """
    enlarge = _interpolation(distances.shape[-1], size)
    across, down = distances.max(1) @ enlarge > 0, distances.max(2) @ enlarge > 0  # (n, size)
    seen = np.flatnonzero(across.any(1) & down.any(1))
    edges = [(m[seen].argmax(1), size - m[seen, ::-1].argmax(1)) for m in (across, down)]
    corners = np.stack([edges[0][0], edges[1][0], edges[0][1], edges[1][1]], 1).tolist()
    return [(name, x0, y0, x1, y1) for x0, y0, x1, y1 in corners]


def mask_box(name: str, mask: np.ndarray) -> list[Box]:
    """The box around a bool mask (h, w); none for an empty one."""
    across, down = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    if not len(across):
        return []
    return [(name, int(across[0]), int(down[0]), int(across[-1]) + 1, int(down[-1]) + 1)]
