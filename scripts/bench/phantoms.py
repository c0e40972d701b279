"""Phantoms: images of 224 px per CPU-second on one core, and H&E fields against drawing one nucleus at a time.

    scripts/bench/phantoms.py [--quick]

The target is 100 images per CPU-second of either kind. The peer draws the same fields with the brush as one would first
write it (tests/phantoms/reference.py, which the tests hold ours to): numpy on the window of each nucleus, in turn. All
else of a field, stroma, glands, stain, scanner, is the same code, so the ratio is that of whole images.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import cv2
import numpy as np
from _timing import Cost, arguments, interleave, measure, report

from medclip.phantoms.generate import generate
from medclip.phantoms.histology import histology_phantom
from medclip.phantoms.nuclei import Nuclei, draw_nuclei

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.phantoms.reference import draw_one_by_one

SIZE, PER_PATIENT = 224, 4
TARGET = 100.0  # images per CPU-second and core
SEED = 0


def main() -> None:
    chosen = arguments(__doc__)
    images, runs = (60, 5) if chosen.quick else (270, 7)
    cv2.setNumThreads(1)
    _same_pictures()
    for kind in ("histology", "xray"):
        generate(kind, SEED, range(4), SIZE)  # the noise bank is made once a process
        _say(kind, [measure(lambda kind=kind: len(generate(kind, SEED, range(images), SIZE))) for _ in range(runs)])
    pairs = interleave(
        lambda: measure(_fields(draw_nuclei, images)), lambda: measure(_fields(draw_one_by_one, images)), runs=runs
    )
    print(f"H&E fields of {SIZE} px, the same {images} on both sides:")
    report("phantoms", pairs, unit="image", peer="per-nucleus-reference")


def _fields(brush: Callable[[Nuclei, float, int], np.ndarray], images: int) -> Callable[[], int]:
    def work() -> int:
        for index in range(images):
            histology_phantom(SEED, index, index // PER_PATIENT, SIZE, draw=brush)
        return images

    return work


def _same_pictures() -> None:
    """Stop unless both sides draw the same.

    Raises:
        SystemExit: they differ by more than rounding.
    """
    for index in range(8):
        ours, peer = (
            histology_phantom(SEED, index, index, SIZE, draw=brush) for brush in (draw_nuclei, draw_one_by_one)
        )
        if np.abs(ours.image.astype(int) - peer.image).max() > 1:
            raise SystemExit(f"the two brushes draw different pictures of index {index}: no comparison is possible")


def _say(kind: str, costs: list[Cost]) -> None:
    rates = [1 / cost.each for cost in costs]
    wall = median(cost.units / cost.wall for cost in costs)
    met = "met" if median(rates) >= TARGET else "MISSED"
    print(
        f"{kind}: {median(rates):.0f} images/CPU-s and core (min {min(rates):.0f}, max {max(rates):.0f}), "
        f"{wall:.0f} images/s wall, {len(costs)} runs of {costs[0].units}; target {TARGET:.0f}: {met}",
        flush=True,
    )


if __name__ == "__main__":
    main()
