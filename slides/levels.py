"""What a pyramid's levels really are: exact downsamples, and the level and read size that a request in mpp needs."""

from __future__ import annotations

import math
from collections.abc import Sequence


def exact_downsample(size0: tuple[int, int], size: tuple[int, int]) -> float:
    """Level-0 pixels per pixel of a level of this size.

    Scanners divide by a whole number n and round each side up, down or to the nearest, so the quotient of the sides is
    only near n (3.9995 for 4; 8.09 for 8 in a small image): where some n explains both sides, it is n. Otherwise the
    mean of the two quotients, as openslide has it.

    Args:
        size0: (width, height) of level 0.
        size: (width, height) of the level.
    """
    quotients = [whole / part for whole, part in zip(size0, size, strict=True)]
    mean = sum(quotients) / 2
    # A power of two that fits goes first: in a small image several n fit.
    near = sorted({math.floor(q) + k for q in quotients for k in (0, 1)} | {2 ** round(math.log2(mean))})
    fits = [n for n in near if n >= 1 and all(_rounds_to(w, n, p) for w, p in zip(size0, size, strict=True))]
    if not fits:
        return mean
    return float(min(fits, key=lambda n: (n & (n - 1) != 0, abs(n - mean))))


def _rounds_to(whole: int, n: int, part: int) -> bool:
    return whole // n == part or -(-whole // n) == part


def best_level(downsamples: Sequence[float], downsample: float) -> int:
    """The coarsest level that is at least as fine as `downsample`; level 0 where none is.

    A level that is a thousandth coarser than asked for counts as fine enough.
    """
    fine = [k for k, own in enumerate(downsamples) if own <= downsample * 1.001]
    return max(fine, key=lambda k: downsamples[k]) if fine else 0
