"""H&E fields with known truth: a tissue class, a magnification, a patient's stain and scanner, perhaps an artefact.

The patient gives the scanner and the staining batch; the image gives the class, the field and the artefact. The field
of view is that of a 224-pixel picture at 0.25, 0.5 or 1 um a pixel (40x, 20x, 10x), whatever the image size, so one
scene can be rendered at any resolution.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

import numpy as np

from medclip.phantoms.artefacts import ARTEFACTS, region, spoil_light, spoil_stain
from medclip.phantoms.captions import histology_captions
from medclip.phantoms.noise import enlarge, grain, texture
from medclip.phantoms.nuclei import Nuclei, draw_nuclei
from medclip.phantoms.phantom import Phantom, image_stream, patient_name, patient_stream, region_boxes
from medclip.phantoms.stain import SCANNERS, batch_vectors, scan, transmit
from medclip.phantoms.tissue import TISSUES, Plot

CLASSES = tuple(TISSUES)
MICRONS = MappingProxyType({"10x": 224.0, "20x": 112.0, "40x": 56.0})  # width of the field under each objective
STRENGTHS = MappingProxyType({"pale": 0.68, "regular": 1.0, "strong": 1.32})
_ARTEFACT_SHARE = 0.3
_CHROMATIN = 0.17  # relative density of the grains


def histology_phantom(
    seed: int,
    index: int,
    patient: int,
    size: int,
    masks: bool = False,
    draw: Callable[[Nuclei, float, int], np.ndarray] = draw_nuclei,
) -> Phantom:
    """The histology image `index` of `patient`; `draw` is the nuclei's brush, which tests replace by a slow one."""
    kind = "histology"
    rng, own = image_stream(kind, seed, index), patient_stream(kind, seed, patient)
    scanner = str(own.choice(list(SCANNERS)))
    strength = str(own.choice(list(STRENGTHS), p=[0.25, 0.5, 0.25]))
    vectors = batch_vectors(SCANNERS[scanner], own)
    balance = own.normal(1, 0.07, 2) * STRENGTHS[strength]

    label = str(rng.choice(CLASSES))
    objective = str(rng.choice(list(MICRONS)))
    artefact = str(rng.choice(ARTEFACTS)) if rng.random() < _ARTEFACT_SHARE else "none"
    attributes = {
        "magnification": objective,
        "stain": strength,
        "artefact": artefact,
        "scanner": scanner,
        "mpp": MICRONS[objective] / size,
    }
    captions = histology_captions(rng, label, attributes)

    um = MICRONS[objective]
    tissue = TISSUES[label](Plot(rng, um, size))
    nuclear = draw(tissue.nuclei, um, size)
    grains = texture(rng, size, um / 0.45)
    hematoxylin = np.maximum(tissue.hematoxylin, 0) + nuclear * (1 + _CHROMATIN * grains)
    eosin = tissue.eosin * (1 - 0.35 * np.minimum(nuclear, 1))
    hematoxylin, eosin = np.float32(balance[0]) * hematoxylin, np.float32(balance[1]) * eosin
    structures = list(tissue.structures)
    where = None
    if artefact != "none":
        where = region(rng, artefact)
        structures.append((artefact, where[None]))
        spoil_stain(artefact, where, hematoxylin, eosin)
    densities = np.asarray(hematoxylin, np.float32), np.asarray(eosin, np.float32)
    light = transmit(*densities, vectors, SCANNERS[scanner])
    if where is not None:
        light = spoil_light(artefact, where, light, rng)
    image = scan(light, SCANNERS[scanner], grain(rng, size, 0.7))

    boxes = [box for name, distances in structures for box in region_boxes(name, distances, size)]
    drawn = {name: np.any([enlarge(d, size) > 0 for d in distances], 0) for name, distances in structures if masks}
    if masks:
        drawn["nuclei"] = nuclear > 0.5 * float(np.median(tissue.nuclei.density))
    return Phantom(image, label, attributes, captions, patient_name(kind, seed, patient), kind, index, boxes, drawn)
