"""Frontal chest X-rays with known truth: one finding or none, with side, zone and severity, as PA or AP view.

Radiological convention throughout: the patient's left is on the image's right. The patient gives the build (thorax,
heart, bones' phase) and the detector; the image gives view, depth of breath and finding.
"""

from __future__ import annotations

import cv2
import numpy as np

from medclip.phantoms.anatomy import Body, bones, build_chest, soft_tissue, vessels
from medclip.phantoms.captions import xray_captions
from medclip.phantoms.findings import FINDINGS, HEART_RATIO, SEVERITIES, SIDED, ZONED, ZONES
from medclip.phantoms.noise import enlarge, grain
from medclip.phantoms.phantom import Phantom, image_stream, mask_box, patient_name, patient_stream

CLASSES = tuple(SEVERITIES)


def xray_phantom(seed: int, index: int, patient: int, size: int, masks: bool = False) -> Phantom:
    """The chest X-ray `index` of `patient`."""
    kind = "xray"
    rng, own = image_stream(kind, seed, index), patient_stream(kind, seed, patient)
    body = Body.draw(own)
    contrast, bright, noise = own.uniform(0.9, 1.2), own.uniform(-0.04, 0.04), own.uniform(0.008, 0.018)

    label = str(rng.choice(CLASSES))
    severities = SEVERITIES[label]
    side, zone = str(rng.choice(["left", "right"])), str(rng.choice(ZONES))
    view = "PA" if rng.random() < 0.6 else "AP"
    severity = severities[int(rng.random() * len(severities))] if severities else "none"
    ratio = rng.uniform(*HEART_RATIO[severity]) if label == "cardiomegaly" else body.heart
    # an AP picture magnifies the heart, which lies far from the detector, and is taken in a shallower breath
    ratio = ratio + 0.03 * (view == "AP")
    attributes = {
        "severity": severity,
        "side": side if label in SIDED else "none",
        "zone": zone if label in ZONED else "none",
        "view": view,
        "cardiothoracic_ratio": ratio,
    }
    captions = xray_captions(rng, label, attributes)

    chest = build_chest(body, ratio, sink=rng.uniform(-0.03, 0.03) - 0.06 * (view == "AP"))
    skeleton = bones(body, size, rng, scapula=rng.uniform(0.3, 1) if view == "AP" else 0.0)
    tree = vessels(size, rng)
    coarse, kept = soft_tissue(chest), chest.lung
    change = FINDINGS[label](chest, attributes, rng) if label in FINDINGS else None
    if change is not None:
        coarse, kept = coarse + change.attenuation, kept * change.vessels
    picture = enlarge(coarse, size) + skeleton + tree * enlarge(kept, size)
    image = _develop(picture, contrast, bright, noise * (1.4 if view == "AP" else 1.0), rng)
    _marker(image, rng)

    shapes = {"lung": chest.lung, "heart": chest.heart}
    boxes = []
    if change is not None:
        shapes[label] = change.extent
        boxes = mask_box(label, enlarge(change.extent - np.float32(0.5), size) > 0)
    drawn = {name: enlarge(shape - np.float32(0.5), size) > 0 for name, shape in shapes.items() if masks}
    return Phantom(
        cv2.merge([image] * 3),
        label,
        attributes,
        captions,
        patient_name(kind, seed, patient),
        kind,
        index,
        boxes,
        drawn,
    )


def _develop(picture: np.ndarray, contrast: float, bright: float, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Attenuation to 8-bit grey levels: quantum noise, stronger where fewer photons arrive, and a film curve."""
    size = len(picture)
    quanta = grain(rng, size, 0.7) * (np.float32(noise) * (0.5 + picture))
    grey = (picture + quanta - np.float32(0.43)) * np.float32(1.05 * contrast) + np.float32(0.5 + bright)
    curve = np.clip(255 / (1 + np.exp(-4.0 * (np.arange(256) / 255 - 0.5))), 0, 255)
    curve = ((curve - curve[0]) * (255 / (curve[-1] - curve[0]))).astype(np.uint8)
    return cv2.LUT(cv2.convertScaleAbs(np.maximum(grey, 0), alpha=255.0), curve)


def _marker(image: np.ndarray, rng: np.random.Generator) -> None:
    """The lead letter that a radiographer lays beside the patient: R on the image's left or L on its right."""
    size = len(image)
    letter, x = ("R", 0.03) if rng.random() < 0.5 else ("L", 0.91)
    scale = size / 224 * 0.55
    place = (round(x * size), round(rng.uniform(0.10, 0.2) * size))
    cv2.putText(image, letter, place, cv2.FONT_HERSHEY_SIMPLEX, scale, 235, max(round(size / 150), 1), cv2.LINE_AA)
