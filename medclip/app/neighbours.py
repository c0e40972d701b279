"""Patches that look alike: those of the same slide, and a sample of the whole cohort's."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from medclip.app.features import Bag, FeatureStore
from slides.errors import SlideError


@dataclass(frozen=True)
class Hit:
    """A patch: its slide, its corner in level-0 pixels, and its score."""

    slide: str
    x: int
    y: int
    side: float
    score: float


def best(scores: np.ndarray, bag: Bag, slide: str, count: int, *, apart: float = 0.0) -> list[Hit]:
    """The patches of the highest scores, best first; none nearer to a better one than `apart` sides."""
    order = np.argsort(-scores, kind="stable")[: count * 40 if apart else count]
    kept: list[int] = []
    for i in order.tolist():
        away = np.abs(bag.coords[kept] - bag.coords[i]).max(axis=1) if kept else np.array([np.inf])
        if away.min() >= apart * bag.side:
            kept.append(i)
        if len(kept) == count:
            break
    return [hit(bag, i, slide, float(scores[i])) for i in kept]


def hit(bag: Bag, row: int, slide: str, score: float) -> Hit:
    """A patch of a bag."""
    x, y = bag.coords[row].tolist()
    return Hit(slide, x, y, bag.side, score)


class Cohort:
    """A sample of every slide's patches, gathered in the background and asked while it grows.

    Args:
        store: of features.
        model: whose.
        slides: names.
        most: patches of all slides together.
    """

    def __init__(self, store: FeatureStore, model: str, slides: Sequence[str], most: int) -> None:
        self.store, self.model = store, model
        self.slides = [name for name in slides if store.has(model, name)]
        self.each = max(most // max(len(self.slides), 1), 1)
        self.done = 0
        self._bags: list[tuple[str, Bag]] = []
        self._lock = threading.Lock()

    def gather(self, stop: threading.Event) -> None:
        """Read the samples; a slide whose features are broken is left out (its own page says why)."""
        for name in self.slides:
            if stop.is_set():
                return
            try:
                bag = self.store.sample(self.model, name, self.each)
            except SlideError:
                bag = None
            with self._lock:
                if bag is not None:
                    self._bags.append((name, bag))
                self.done += 1

    def nearest(self, feature: torch.Tensor, count: int, *, without: str) -> list[Hit]:
        """The patches of other slides most like a feature (d,), best first."""
        with self._lock:
            bags = [(name, bag) for name, bag in self._bags if name != without]
        found: list[Hit] = []
        for name, bag in bags:
            found += best(bag.scores(feature.float()), bag, name, count)
        return sorted(found, key=lambda hit: -hit.score)[:count]
