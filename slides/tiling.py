"""Where the patches of a slide lie: a regular grid in level-0 pixels, and the part of it that a mask covers."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from slides import mask as masks
from slides.errors import SlideError

_MOST = 100_000_000


def grid(
    size0: tuple[int, int],
    side: float,
    step: float,
    *,
    snap: int = 1,
    origin: tuple[int, int] = (0, 0),
    edge: Literal["keep", "drop"] = "keep",
) -> np.ndarray:
    """Top-left corners of squares on a regular grid that covers the slide, row by row.

    Corner k is k x step, rounded to a multiple of `snap` and not summed up: no drift, however many there are. A row or
    column ends with the first square that reaches the border, so none lies wholly in what others cover unless
    `step < side` asks for overlap.

    Args:
        size0: (width, height) of the slide, in level-0 pixels.
        side: of a square, in level-0 pixels; need not be whole.
        step: from one square to the next, in level-0 pixels; need not be whole. Below `side` squares overlap, above it
            gaps remain.
        snap: corners, less the origin, are multiples of it.
        origin: the first corner; nothing left of it or above it is covered.
        edge: `keep` squares that stick out at the right and bottom, or `drop` them.

    Returns:
        int64 (N, 2), x and y.

    Raises:
        SlideError: a size that is not above 0, a step below `snap` (corners would coincide), or more than 10^8 squares.
    """
    if not (0 < side < math.inf and 0 < step < math.inf and snap >= 1):
        raise SlideError(f"a grid of squares of {side} every {step} pixels, snapped to {snap}: all must be above 0")
    if step < snap:
        raise SlideError(f"a step of {step:g} level-0 pixels is below the {snap} that corners are rounded to")
    if edge not in ("keep", "drop"):
        raise SlideError(f"edge is {edge!r}: use keep or drop")
    axes = [_axis(length, side, step, snap, start, edge) for length, start in zip(size0, origin, strict=True)]
    if len(axes[0]) * len(axes[1]) > _MOST:
        raise SlideError(
            f"{len(axes[0])} x {len(axes[1])} squares every {step:g} level-0 pixels are too many: take a larger step"
        )
    x, y = np.meshgrid(*axes)
    return np.stack([x.ravel(), y.ravel()], axis=1)


def _axis(length: int, side: float, step: float, snap: int, start: int, edge: str) -> np.ndarray:
    count = math.ceil(max(length - start, 0) / step) + 1
    if count > _MOST:
        raise SlideError(f"{count} squares in a row are too many: take a step above {step:g} level-0 pixels")
    # floor(x + 0.5), for np.round would round halves up and down in turn.
    at = start + np.floor(np.arange(count) * (step / snap) + 0.5).astype(np.int64) * snap
    if edge == "drop":
        return at[at + side <= length]
    reached = np.concatenate([[False], at[:-1] + side >= length])
    return at[(at < length) & ~reached]


def tiles(
    mask: masks.Mask | None,
    size0: tuple[int, int],
    side: float,
    step: float,
    coverage: float = 0.5,
    *,
    snap: int = 1,
    origin: tuple[int, int] = (0, 0),
    edge: Literal["keep", "drop"] = "keep",
) -> tuple[np.ndarray, np.ndarray]:
    """The squares of a grid that a mask covers enough.

    Args:
        mask: what to cover; None for the whole slide.
        size0: see `grid`.
        side: see `grid`.
        step: see `grid`.
        coverage: least share of a square that the mask covers; 0 keeps every square. What sticks out of the slide is
            not covered.
        snap: see `grid`.
        origin: see `grid`.
        edge: see `grid`.

    Returns:
        coords int64 (N, 2) and each one's share float32 (N,).

    Raises:
        SlideError: a coverage outside 0 to 1, or as `grid`.
    """
    if not 0 <= coverage <= 1:
        raise SlideError(f"coverage is {coverage}: give a share from 0 to 1")
    coords = grid(size0, side, step, snap=snap, origin=origin, edge=edge)
    if mask is None:
        within = np.clip(np.minimum(coords + side, size0) - np.maximum(coords, 0), 0, side) / side
        share = within.prod(axis=1).astype(np.float32)
    else:
        share = masks.coverage(mask, coords, side)
    # Compared in float32, or a square of which exactly 0.7 is covered would fail coverage=0.7.
    keep = share >= np.float32(coverage)
    return coords[keep], share[keep]
