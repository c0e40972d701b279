"""Generated slides as bags of features: a rare kind of patch decides the label, and where it lies is known.

A patch is one of a few kinds of tissue (a mean of its own), under the shift that all patches of its slide have, as a
stain has it. In slides with a finding a share of the patches, next to each other on the grid, goes further along the
direction of that finding. So the mean of a bag tells little, a single patch much, and attention can be scored on the
region. A patient has two slides with the same truth. Everything is a function of (recipe, index).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from medclip.types import UserError

SIDE = 256  # level-0 pixels of a patch
ENCODER = "phantom"
PER_PATIENT = 2
TARGETS = ("classes", "ordinal", "multilabel", "survival")
CLASSES = {
    "classes": ("absent", "planted"),
    "ordinal": ("grade 0", "grade 1", "grade 2", "grade 3"),
    "multilabel": ("finding a", "finding b", "finding c"),
}
_AMOUNTS = (0, 1, 3, 9)  # times `rare`, of a grade and of what survival hangs on
_HAZARD = 0.02  # events a month without a finding; each step of the amounts makes it e times as much
_CENSORED = 60.0  # months, at most
_KINDS = 6
_STREAM = 2000  # apart from the streams of pictures


@dataclass(frozen=True)
class BagRecipe:
    """What bags to generate.

    Args:
        slides: how many.
        patches: of a slide, on average; from 0.6 to 1.4 times as many.
        dim: of a feature.
        rare: share of the patches that show a finding, where there is one.
        seed: of everything.
        target: what the truth is: classes, ordinal, multilabel or survival.
        signal: how far a finding shifts a patch, in standard deviations of its noise.
        shift: standard deviation of what all patches of a slide share.
    """

    slides: int = 200
    patches: int = 500
    dim: int = 64
    rare: float = 0.01
    seed: int = 0
    target: str = "classes"
    signal: float = 6.0
    shift: float = 0.2

    def __post_init__(self) -> None:
        least = {"slides": 1, "patches": 4, "dim": 2, "seed": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise UserError(f"phantoms.{name} is {value!r}: give a whole number, {low} or more")
        for name, high in {"rare": 1.0, "signal": 1e3, "shift": 1e3}.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high:
                raise UserError(f"phantoms.{name} is {value!r}: give a number from 0 to {high:g}")
        if self.target not in TARGETS:
            raise UserError(f"phantoms.target is {self.target!r}: choose of {', '.join(TARGETS)}")

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> BagRecipe:
        """From a config.

        Raises:
            UserError: an unknown key or a value out of range.
        """
        if not isinstance(config, Mapping):
            raise UserError(f"phantoms is {config!r}: write {{slides: 200, patches: 500, rare: 0.01, seed: 1}}")
        if unknown := set(config) - set(cls.__dataclass_fields__):
            keys = ", ".join(cls.__dataclass_fields__)
            raise UserError(f"phantoms has unknown keys {sorted(map(str, unknown))}: use {keys}")
        return cls(**{str(key): value for key, value in config.items()})


class PhantomBag(NamedTuple):
    """One generated slide."""

    features: np.ndarray  # float32 (n, dim)
    coords: np.ndarray  # int64 (n, 2) level-0 (x, y), each SIDE wide
    planted: np.ndarray  # bool (n,): shows a finding


def bag_row(recipe: BagRecipe, index: int) -> dict[str, Any]:
    """What a table would say of a slide: slide, patient, and label (a text, `|` between several) or time and event."""
    patient = index // PER_PATIENT
    name = f"bag-{recipe.seed}-{patient:05d}"
    row: dict[str, Any] = {"slide": f"{name}-{index % PER_PATIENT}", "patient": name}
    if recipe.target == "survival":
        rng = np.random.default_rng([recipe.seed, _STREAM, 1, patient])
        event = rng.exponential(1 / (_HAZARD * np.exp(_amount(recipe, index))))
        last = rng.uniform(0, _CENSORED)
        return row | {"time": round(float(min(event, last)), 3), "event": int(event <= last)}
    names = CLASSES[recipe.target]
    if recipe.target == "multilabel":
        return row | {"label": "|".join(names[k] for k in _findings(recipe, index))}
    return row | {"label": names[_amount(recipe, index)]}


def bag_size(recipe: BagRecipe, index: int) -> int:
    """Patches of a slide."""
    rng = np.random.default_rng([recipe.seed, _STREAM, 2, index])
    return max(1, round(recipe.patches * rng.uniform(0.6, 1.4)))


def make_bag(recipe: BagRecipe, index: int) -> PhantomBag:
    """The slide `index`."""
    means, directions = _world(recipe)
    n = bag_size(recipe, index)
    rng = np.random.default_rng([recipe.seed, _STREAM, 0, index])
    cells = _tissue(n)
    kinds = rng.choice(len(means), n, p=rng.dirichlet(np.ones(len(means))))
    values = means[kinds] + recipe.shift * rng.standard_normal(recipe.dim) + rng.standard_normal((n, recipe.dim))
    share = (
        recipe.rare if recipe.target in ("classes", "multilabel") else recipe.rare * _AMOUNTS[_amount(recipe, index)]
    )
    count = min(n, max(1, round(share * n))) if share else 0
    planted = np.zeros(n, dtype=bool)
    for finding in _findings(recipe, index):
        away = ((cells - cells[rng.integers(n)]) ** 2).sum(axis=1)
        region = np.argsort(away, kind="stable")[:count]
        values[region] += recipe.signal * directions[finding]
        planted[region] = True
    return PhantomBag(values.astype(np.float32), cells * SIDE, planted)


def _amount(recipe: BagRecipe, index: int) -> int:
    """Class, grade or step of a slide's patient."""
    return index // PER_PATIENT % (2 if recipe.target == "classes" else len(_AMOUNTS))


def _findings(recipe: BagRecipe, index: int) -> list[int]:
    """Numbers of the findings that a slide shows."""
    if recipe.target == "multilabel":
        bits = index // PER_PATIENT % 2 ** len(CLASSES["multilabel"])
        return [k for k in range(len(CLASSES["multilabel"])) if bits >> k & 1]
    return [0] if _amount(recipe, index) else []


def _world(recipe: BagRecipe) -> tuple[np.ndarray, np.ndarray]:
    """Means (kinds, dim) of the tissues and unit directions (3, dim) of the findings; the same for all slides."""
    rng = np.random.default_rng([recipe.seed, _STREAM, 3])
    directions = rng.standard_normal((len(CLASSES["multilabel"]), recipe.dim))
    return rng.standard_normal((_KINDS, recipe.dim)), directions / np.linalg.norm(directions, axis=1, keepdims=True)


def _tissue(n: int) -> np.ndarray:
    """int64 (n, 2): a round piece of tissue, as cells of a grid in reading order."""
    side = int(np.ceil(np.sqrt(n / 0.7)))
    y, x = np.divmod(np.arange(side * side), side)
    inside = np.argsort((x - (side - 1) / 2) ** 2 + (y - (side - 1) / 2) ** 2, kind="stable")[:n]
    inside.sort()
    return np.stack([x[inside], y[inside]], axis=1).astype(np.int64)
