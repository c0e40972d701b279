"""`generate(kind, seed, indices)`: batches of phantoms, the same whatever the batches are."""

from __future__ import annotations

from collections.abc import Iterable

from medclip.phantoms import histology, xray
from medclip.phantoms.phantom import KINDS, MAX_SIZE, MIN_SIZE, Phantom
from medclip.types import UserError

CLASSES = {"histology": histology.CLASSES, "xray": xray.CLASSES}
_DRAW = {"histology": histology.histology_phantom, "xray": xray.xray_phantom}


def generate(
    kind: str, seed: int, indices: Iterable[int], size: int = 224, *, per_patient: int = 4, masks: bool = False
) -> list[Phantom]:
    """Phantoms `indices` of the endless set (`kind`, `seed`), `size` pixels wide and high.

    Images `per_patient * p` to `per_patient * (p + 1) - 1` belong to patient p. The same arguments give the same bytes;
    another size shows the same scene.

    Raises:
        UserError: unknown kind, or a size outside 64..1024.
    """
    if kind not in KINDS:
        raise UserError(f"unknown phantom kind {kind!r}: choose one of {', '.join(KINDS)}")
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise UserError(f"phantom size {size} is not possible: choose {MIN_SIZE} to {MAX_SIZE} pixels")
    return [_DRAW[kind](seed, index, index // per_patient, size, masks) for index in indices]
