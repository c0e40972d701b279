"""Chest findings: what each does to the attenuation, and where it is.

A function per finding takes the chest, its facts (side, zone, severity) and a random stream, and returns a `Change`: a
soft extent whose half-way line is the mask, what it adds to the attenuation, and how much of the vessels stays visible.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from medclip.phantoms.anatomy import Chest
from medclip.phantoms.noise import GRID, ramp, smooth

ZONES = ("upper", "middle", "lower")
SEVERITIES = MappingProxyType(
    {
        "pleural effusion": ("small", "moderate", "large"),
        "lung nodule": ("small", "large"),
        "pneumothorax": ("small", "large"),
        "cardiomegaly": ("mild", "marked"),
        "lung consolidation": ("faint", "dense"),
        "no finding": (),
    }
)
SIDED = ("pleural effusion", "lung nodule", "pneumothorax", "lung consolidation")
ZONED = ("lung nodule", "lung consolidation")
HEART_RATIO = MappingProxyType({"mild": (0.55, 0.59), "marked": (0.64, 0.70)})


@dataclass
class Change:
    """Arrays (GRID, GRID): soft extent 0..1, added attenuation, share of vessels that stays."""

    extent: np.ndarray
    attenuation: np.ndarray
    vessels: np.ndarray | float = 1.0


def zone_height(chest: Chest, zone: str) -> tuple[float, float]:
    """Top and bottom (y) of a third of the lung."""
    third = (chest.body.dome - chest.body.apex) / 3
    top = chest.body.apex + third * ZONES.index(zone)
    return top, top + third


def effusion(chest: Chest, facts: dict[str, Any], rng: np.random.Generator) -> Change:
    """Fluid at the base: a dense layer with a meniscus that climbs the lateral wall and blunts the angle."""
    height = {"small": (0.10, 0.16), "moderate": (0.34, 0.44), "large": (0.66, 0.82)}[facts["severity"]]
    level = chest.body.dome + 0.10 - rng.uniform(*height)
    surface = (
        level - 0.34 * np.exp(-np.maximum(chest.wall, 0) / 0.10) + 0.05 * np.exp(-(((chest.wall - 0.35) / 0.2) ** 2))
    )
    extent = chest.lung * chest.half(facts["side"]) * ramp(chest.y - surface, 0.06)
    return Change(extent, 0.36 * extent, 1 - extent)


def nodule(chest: Chest, facts: dict[str, Any], rng: np.random.Generator) -> Change:
    """A round, well-defined opacity clear of heart and wall."""
    radius = rng.uniform(*{"small": (0.050, 0.065), "large": (0.10, 0.13)}[facts["severity"]])
    x, y = _place(chest, facts, rng, radius)
    away = np.hypot(chest.x - x, chest.y - y) * (1 + 0.06 * smooth(rng, 9))
    extent = ramp(radius - away, 0.022)
    return Change(extent, (0.20 + 0.06 * (facts["severity"] == "large")) * extent)


def pneumothorax(chest: Chest, facts: dict[str, Any], rng: np.random.Generator) -> Change:
    """Air between lung and chest wall, widest at the apex: black, without vessels, behind a thin pleural line."""
    width = rng.uniform(*{"small": (0.10, 0.14), "large": (0.24, 0.32)}[facts["severity"]])
    reach = {"small": 0.55, "large": 1.1}[facts["severity"]]
    edge = width * np.clip((chest.body.apex + reach - chest.y) / reach, 0, 1) ** 0.6
    apical = np.hypot(0.35 * np.maximum(chest.wall, 0), np.maximum(chest.y - chest.body.apex, 0))
    rim = np.minimum(np.minimum(chest.wall, apical) - edge, chest.medial)
    side = chest.half(facts["side"]) * chest.lung
    extent = side * ramp(-rim, 0.015) * (edge > 0.005)
    line = side * np.exp(-((rim / 0.011) ** 2)) * (edge > 0.015)
    collapse = side * (1 - ramp(-rim, 0.015)) * (0.07 if facts["severity"] == "large" else 0.03)
    return Change(extent, 0.16 * line - 0.09 * extent + collapse, 1 - extent)


def consolidation(chest: Chest, facts: dict[str, Any], rng: np.random.Generator) -> Change:
    """Fluffy, ill-defined airspace opacity in one zone."""
    x, y = _place(chest, facts, rng, 0.16)
    ragged = smooth(rng, 8) + 0.6 * smooth(rng, 16)
    away = np.hypot((chest.x - x) / 1.15, chest.y - y)
    extent = ramp(0.20 + 0.035 * ragged - away, 0.14) * chest.lung * chest.half(facts["side"])
    strength = {"faint": 0.15, "dense": 0.29}[facts["severity"]]
    return Change(extent, extent * (strength * (1 + 0.13 * ragged)), 1 - 0.8 * extent)


def cardiomegaly(chest: Chest, facts: dict[str, Any], rng: np.random.Generator) -> Change:
    """The heart is drawn wide (`HEART_RATIO`) when the chest is built; here only its extent, and fuller hila."""
    del facts, rng
    return Change(chest.heart, np.zeros_like(chest.lung), 1.35)


FINDINGS: dict[str, Callable[[Chest, dict[str, Any], np.random.Generator], Change]] = {
    "pleural effusion": effusion,
    "lung nodule": nodule,
    "pneumothorax": pneumothorax,
    "cardiomegaly": cardiomegaly,
    "lung consolidation": consolidation,
}


def _place(chest: Chest, facts: dict[str, Any], rng: np.random.Generator, margin: float) -> tuple[float, float]:
    """A random centre in the zone of the lung, `margin` away from wall, heart and diaphragm where there is room."""
    top, bottom = zone_height(chest, facts["zone"])
    y = np.linspace(top + 0.06, bottom - 0.04, 40, dtype=np.float32)
    x = np.linspace(0.1, 0.8, 40, dtype=np.float32) * (-1 if facts["side"] == "right" else 1)
    row = np.clip(((y + 1) * GRID / 2).astype(int), 0, GRID - 1)
    column = np.clip(((x + 1) * GRID / 2).astype(int), 0, GRID - 1)
    at = np.ix_(row, column)
    room = np.minimum(np.minimum(chest.wall[at], chest.medial[at]), chest.dome[at])
    good = np.flatnonzero(room > min(margin, 0.9 * float(room.max())))
    chosen = good[int(rng.random() * len(good))]
    return float(x[chosen % 40]), float(y[chosen // 40])
