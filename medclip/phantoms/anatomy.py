"""The normal chest as an X-ray sees it: body, lungs, heart, diaphragm, bones and vessels as layers.

Coordinates run from -1 to 1 across the image, y downwards, in the radiological convention: the patient's right is on
the image's left. Layers are float32 and add up to an attenuation in display units (0 black, 1 white). Soft parts are
drawn on the coarse grid (GRID, GRID), thin ones, bones and vessels, at full size.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from medclip.phantoms.noise import GRID, ramp


@dataclass(frozen=True)
class Body:
    """A patient's build, constant over all images: half widths and heights in image units."""

    width: float  # inner half width of the thorax
    apex: float  # y of the lung apices
    dome: float  # y of the diaphragm's right dome in full inspiration
    heart: float  # cardiothoracic ratio without disease
    stout: float  # soft tissue density, 0.8 slim .. 1.2 obese
    breasts: bool
    shape: float  # phase of individual differences

    @staticmethod
    def draw(rng: np.random.Generator) -> Body:
        """A random adult."""
        return Body(
            rng.uniform(0.70, 0.80), rng.uniform(-0.76, -0.68), rng.uniform(0.40, 0.52), rng.uniform(0.40, 0.47),
            rng.uniform(0.85, 1.15), bool(rng.random() < 0.5), rng.uniform(0, 1),
        )  # fmt: skip


@dataclass
class Chest:
    """One chest on the coarse grid: axes and signed distances (positive inside) that findings are drawn with."""

    x: np.ndarray  # (1, GRID)
    y: np.ndarray  # (GRID, 1)
    body: Body
    wall: np.ndarray  # depth below the inner chest wall
    dome: np.ndarray  # depth above the diaphragm
    medial: np.ndarray  # distance from the mediastinum's border
    lung: np.ndarray  # soft lung field, 0..1
    heart: np.ndarray  # soft heart, 0..1

    def half(self, side: str) -> np.ndarray:
        """True (1, GRID) on the patient's `side`: "right" is the image's left half."""
        return self.x < 0 if side == "right" else self.x > 0


def build_chest(body: Body, ratio: float, sink: float) -> Chest:
    """Shape a chest whose heart spans `ratio` of the thorax; `sink` lowers the diaphragm (deeper breath)."""
    axis = ((np.arange(GRID, dtype=np.float32) + 0.5) * (2 / GRID) - 1).astype(np.float32)
    x, y = axis[None, :], axis[:, None]
    reach = np.clip(1 - ((y - 0.42) / (0.42 - body.apex)) ** 2, 0, 1)
    inner = body.width * np.where(y > 0.42, 1.0, reach**0.36).astype(np.float32)
    wall = inner - np.abs(x)
    level = body.dome + sink + 0.05 * (x > 0)
    dome = level + 0.27 * (np.abs(np.abs(x) - 0.36) / 0.4) ** 2.4 - y
    # the heart rests on the diaphragm: no lung shows through between them beside the spine
    base = 0.14 * ramp(y - (level - 0.06), 0.24)
    mediastinum = base + 0.115 + 0.05 * np.exp(-(((y + 0.5) / 0.3) ** 2)) + 0.03 * np.exp(-(((y - 0.02) / 0.12) ** 2))
    # the heart: two thirds on the patient's left, pointing down and outwards
    span = 2 * ratio * body.width
    right, left = 0.34 * span, 0.66 * span
    centre, half = (left - right) / 2, span / 2
    lean = 0.22 * (x - centre)
    heart = 1 - np.hypot((x - centre) / half, (y - (level - 0.16 - 0.15 * half + lean)) / (0.11 + 0.5 * half))
    medial = np.minimum(np.abs(x) - mediastinum, -heart * half)
    knob = 0.075 - np.hypot(x - 0.13, y + 0.30)
    medial = np.minimum(medial, -knob).astype(np.float32)
    lung = ramp(wall, 0.03) * ramp(dome, 0.03) * ramp(medial, 0.035)
    return Chest(x, y, body, wall, dome.astype(np.float32), medial, lung, ramp(heart, 0.10).astype(np.float32))


def soft_tissue(chest: Chest) -> np.ndarray:
    """Muscle, fat, mediastinum and abdomen with the air outside the body."""
    x, y, body = chest.x, chest.y, chest.body
    shoulder = ramp(y + 0.83 - 0.22 * np.clip(np.abs(x) - 0.25, 0, 1) ** 1.3 * 1.6, 0.05)
    neck = ramp(0.24 - np.abs(x), 0.05)
    trunk = np.maximum(
        shoulder * ramp(1.15 * body.width + 0.13 + 0.35 * np.clip(-0.35 - y, 0, 1) - np.abs(x), 0.04), neck
    )
    tissue = 0.50 + 0.05 * body.stout - 0.12 * np.clip(np.abs(x) - 0.55, 0, 1)
    tissue = tissue + 0.10 * np.exp(-((x / 0.16) ** 2)) + 0.13 * body.stout * ramp(y - 0.45, 0.5)
    if body.breasts:
        breast = ramp(0.30 - np.hypot(np.abs(x) - 0.44, 0.85 * (y - 0.26)), 0.12)
        tissue = tissue + 0.07 * body.stout * breast * ramp(y - 0.1, 0.4)
    tissue -= chest.lung * (0.40 - 0.05 * body.stout + 0.05 * ramp(chest.wall - 0.12, 0.3))
    tissue += 0.06 * chest.heart
    stomach = ramp(0.10 - np.hypot(0.8 * (x - 0.38), y - (body.dome + 0.22)), 0.06)
    tissue -= 0.13 * stomach * ramp(-chest.dome, 0.03)
    vertebrae = 0.5 + 0.5 * np.cos((y - body.apex) * (2 * np.pi / 0.165))
    tissue = tissue + ramp(0.085 - np.abs(x), 0.03) * (0.03 + 0.035 * vertebrae)
    hilum = np.exp(-(((np.abs(x) - 0.19) / 0.07) ** 2)) * np.exp(-((y / 0.13) ** 2))
    return ((tissue + 0.10 * chest.lung * hilum) * trunk).astype(np.float32)


def bones(body: Body, size: int, rng: np.random.Generator, scapula: float) -> np.ndarray:
    """Ribs, clavicles and shoulders (size, size); `scapula` > 0 shows the blades over the lungs, as AP views do."""
    t = np.linspace(0, 1, 16)
    side = np.asarray([-1.0, 1.0])[:, None, None]
    k = np.arange(10)[:, None]
    top = body.apex + 0.07 + 0.128 * k
    slope = 0.06 + 0.05 * body.shape + 0.012 * k
    reach = np.clip(1 - ((top + 0.05 - 0.42) / (0.42 - body.apex)) ** 2, 0.16, 1) ** 0.36
    wide = body.width * np.where(top < 0.37, reach, 1) + 0.01
    posterior = _bands(
        side * (0.09 + (wide - 0.09) * np.sin(t * np.pi / 2)),
        top - 0.05 * np.sin(t * np.pi) + slope * t**2 + 0.11 * t**6, 0.021 + 0.012 * t, size,
    )  # fmt: skip
    anterior = _bands(
        side * (wide - (wide - 0.30 - 0.02 * k) * t)[1:8],
        (top + slope + 0.11 + 0.24 * t**1.3)[1:8],
        0.024 + 0.008 * t,
        size,
    )
    tilt = rng.uniform(-0.015, 0.015, (2, 1, 1))
    collar = _bands(
        side * (0.07 + 0.62 * t), body.apex + 0.17 - 0.10 * t - 0.035 * np.sin(2 * np.pi * t) + tilt,
        0.026 + 0.012 * np.abs(t - 0.5), size,
    )  # fmt: skip
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    joints = _pixels(
        side[:, 0] * (body.width + 0.18 + 0.115 * np.cos(angle)), body.apex + 0.20 + 0.115 * np.sin(angle), size
    )
    layers = np.zeros((3, size, size), np.uint8)
    cv2.fillPoly(layers[0], posterior, 255, cv2.LINE_AA, 4)
    cv2.fillPoly(layers[1], anterior, 255, cv2.LINE_AA, 4)
    if scapula > 0:
        blade = body.width + np.asarray([0.10, -0.16 - 0.1 * scapula, -0.10 - 0.1 * scapula, 0.10])
        blades = _pixels(side[:, 0] * blade, body.apex + np.asarray([0.18, 0.22, 0.72, 0.62]), size)
        cv2.fillPoly(layers[2], list(blades), 70, cv2.LINE_AA, 4)
    cv2.fillPoly(layers[2], list(joints), 150, cv2.LINE_AA, 4)
    cv2.fillPoly(layers[2], collar, 255, cv2.LINE_AA, 4)
    sigma = size / 260
    total = cv2.GaussianBlur(layers[2].astype(np.float32), (0, 0), sigma) * np.float32(0.12 / 255)
    for layer, weight in ((layers[0], 0.085), (layers[1], 0.055)):
        rib = cv2.GaussianBlur(layer.astype(np.float32), (0, 0), sigma)
        # a rib is a tube: its cortex, the rim, shows brighter than its middle
        middle = cv2.blur(rib, (1 + 2 * (size // 64),) * 2)
        total += cv2.addWeighted(rib, 1.5 * weight / 255, middle, -0.6 * weight / 255, 0)
    # below the diaphragm bone hardly differs from what lies around it
    y = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    return total * (1 - 0.7 * ramp(y - np.float32(body.dome + 0.12), 0.3))[:, None]


def vessels(size: int, rng: np.random.Generator) -> np.ndarray:
    """Pulmonary vessels (size, size): trees that leave the hila and thin out; to be cut to the lungs."""
    layer = np.zeros((size, size), np.uint8)
    count, steps = 44, 9
    side = np.where(np.arange(count) % 2, 1.0, -1.0)
    heading = np.linspace(-1.35, 1.45, count // 2).repeat(2) + rng.normal(0, 0.12, count)
    turns = heading[:, None] + np.cumsum(rng.normal(0, 0.13, (count, steps)), 1)
    length = rng.uniform(0.04, 0.075, count)[:, None]
    x = side[:, None] * (0.17 + np.cumsum(np.cos(turns) * length, 1))
    y = np.cumsum(np.sin(turns) * length, 1) + rng.normal(0, 0.05, count)[:, None]
    points = _pixels(x, y, size)
    for thick, start, stop in ((3, 0, 4), (2, 3, 7), (1, 6, steps)):
        pixels = max(round(thick * size / 300), 1)
        shade = min(int(85 * thick * size / (300 * pixels)), 255)
        cv2.polylines(layer, list(points[:, start:stop]), False, shade, pixels, cv2.LINE_AA, 4)
    return cv2.GaussianBlur(layer.astype(np.float32), (0, 0), size / 280) * np.float32(0.2 / 255)


def _pixels(x: np.ndarray, y: np.ndarray, size: int) -> np.ndarray:
    """Image units to OpenCV's fixed-point pixels (..., 2) with four fractional bits."""
    both = np.stack(np.broadcast_arrays(x, y), -1)
    return np.rint(((both + 1) * (size / 2) - 0.5) * 16).astype(np.int32)


def _bands(x: np.ndarray, y: np.ndarray, half: np.ndarray, size: int) -> list[np.ndarray]:
    """Outlines of curved bands of half width `half` around lines (..., points)."""
    x, y = np.broadcast_arrays(x, y)
    dx, dy = np.gradient(x, axis=-1), np.gradient(y, axis=-1)
    norm = half / np.hypot(dx, dy)
    there, back = _pixels(x - dy * norm, y + dx * norm, size), _pixels(x + dy * norm, y - dx * norm, size)
    outline = np.concatenate([there, back[..., ::-1, :]], -2)
    return list(outline.reshape(-1, *outline.shape[-2:]))
