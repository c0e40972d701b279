"""A map of a slide: how much each patch is like a text, or what a slide model looked at, ready to be laid over it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import cv2
import numpy as np
import torch

from medclip.app.features import Bag
from slides.heat_colours import Scale, make_scale, table
from slides.heatmap import HeatMap, heat_map

_LONGEST = 1024  # pixels of an overlay at least, so that a browser does not blur patches into each other
_STOPS = 9


class SlideModel(Protocol):
    """A model of whole slides (medclip.models.mil)."""

    dim: int
    encoder: str | None
    classes: list[str]
    target: str

    def predict(self, bag: torch.Tensor, real: torch.Tensor | None = None) -> Any: ...  # scores, attention, slide


@dataclass(frozen=True)
class Wanted:
    """Which map.

    Args:
        slide: its name.
        model: a CLIP or a slide model, by its name in the viewer.
        prompt: that a CLIP compares patches with; None for a slide model's attention.
        against: a second prompt, whose similarity is taken off.
    """

    slide: str
    model: str
    prompt: str | None = None
    against: str | None = None

    @property
    def title(self) -> str:
        if self.prompt is None:
            return f"attention of {self.model}"
        return self.prompt if self.against is None else f"{self.prompt} − {self.against}"


@dataclass(frozen=True)
class Map:
    """Values of a slide's patches, and how they are coloured.

    Args:
        wanted: what it shows.
        values: float32 (n,).
        coords: int64 (n, 2), level 0.
        side: of a patch.
        size: (width, height) of the slide.
        unit: what the values are, in words.
        outcome: what a slide model says of the slide: name to number.
    """

    wanted: Wanted
    values: np.ndarray
    coords: np.ndarray
    side: float
    size: tuple[int, int]
    unit: str
    outcome: Mapping[str, float]

    @property
    def bytes(self) -> int:
        return self.values.nbytes + 8 * self.values.size  # and its grid

    @cached_property
    def heat(self) -> HeatMap:
        return heat_map(self.values, self.coords, self.side, self.size)

    @cached_property
    def scale(self) -> Scale:
        return make_scale(self.values, "viridis" if self.wanted.against is None else "RdBu_r")

    def about(self) -> dict[str, Any]:
        """Where the overlay lies in level-0 pixels, and its colour bar."""
        rows, columns = self.heat.grid.shape
        stops = table(self.scale.palette)[np.linspace(0, 255, _STOPS).round().astype(int)]
        return {
            "title": self.wanted.title,
            "unit": self.unit,
            "patches": len(self.values),
            "low": self.scale.low,
            "high": self.scale.high,
            "least": float(self.values.min()),
            "greatest": float(self.values.max()),
            "scale": self.scale.said,
            "stops": [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in stops.tolist()],
            "x": self.heat.origin[0],
            "y": self.heat.origin[1],
            "width": columns * self.heat.cell,
            "height": rows * self.heat.cell,
            "side": self.side,
            "outcome": dict(self.outcome),
        }

    def overlay(self) -> bytes:
        """PNG of the grid, transparent where no patch is; some pixels a cell, so that its edges stay sharp."""
        grid, real = self.heat.grid, self.heat.real
        rgb = self.scale.colour(grid)
        bgra = np.dstack([rgb[..., ::-1], np.where(real, 255, 0).astype(np.uint8)])
        more = max(1, min(16, -(-_LONGEST // max(grid.shape))))
        large = cv2.resize(bgra, None, fx=more, fy=more, interpolation=cv2.INTER_NEAREST)
        good, png = cv2.imencode(".png", large, [cv2.IMWRITE_PNG_COMPRESSION, 3])
        assert good
        return png.tobytes()


def text_map(
    wanted: Wanted, bag: Bag, size: tuple[int, int], prompt: torch.Tensor, against: torch.Tensor | None
) -> Map:
    """Cosines of patches with a text (d,), or how much higher they are than with another."""
    values = bag.scores(prompt)
    if against is not None:
        values = values - bag.scores(against)
    unit = "cosine similarity" if against is None else "difference of cosine similarities"
    return Map(wanted, values, bag.coords, bag.side, size, unit, {})


@torch.inference_mode()
def attention_map(wanted: Wanted, bag: Bag, size: tuple[int, int], model: SlideModel) -> Map:
    """What a slide model attends to, as multiples of an even share, averaged over its branches."""
    found = model.predict(bag.features.float()[None])
    values = found.attention[0].float().mean(dim=0) * len(bag.coords)
    scores = found.scores[0].reshape(-1).tolist()
    names = model.classes if len(model.classes) == len(scores) else ["risk"]
    outcome = dict(zip(names, scores, strict=False))
    return Map(wanted, values.numpy(), bag.coords, bag.side, size, "attention, 1 = an even share", outcome)
