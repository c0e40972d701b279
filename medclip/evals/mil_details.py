"""What the report shows of a model of slides besides its metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SlideExample:
    """A slide of the gallery.

    `heat` (JPEG) is its attention patch by patch, by rank; `tops` (JPEG) are the patches with the highest attention,
    where slides are at hand, and `share` is how much of the attention falls on that many patches. `scored` is the
    probability of what was said, or the risk; `located` the AUROC of attention against its region, NaN without one.
    """

    key: str
    truth: str
    said: str
    scored: float
    patches: int
    heat: bytes | None
    tops: list[bytes]
    share: float
    located: float


@dataclass(frozen=True)
class FoldRow:
    """One fold: its slides and patients, and its headline metrics."""

    fold: int
    slides: int
    patients: int
    values: dict[str, float]


@dataclass(frozen=True)
class SurvivalCurve:
    """Kaplan-Meier's curve of the slides with a risk above or below the median: (time, share) at each step."""

    name: str
    slides: int
    events: int
    steps: list[tuple[float, float]]


@dataclass(frozen=True)
class MilDetails:
    """Sizes, tables and examples. Class order is that of `classes` throughout."""

    target: str
    classes: list[str]
    support: list[int]  # slides of each class, or with each finding
    slides: int
    patients: int
    patches: tuple[int, int, int]  # fewest, median, most of a slide
    unit: str  # what time is in
    events: int
    confusion: list[list[int]]  # row: truth, column: prediction; empty for findings and survival
    folds: list[FoldRow]  # empty for a single model
    regions: int  # slides with patches inside and outside of a region
    top: int  # patches shown of a slide, and that its share of attention is of
    curves: list[SurvivalCurve]
    shown: dict[str, list[SlideExample]]  # title -> slides, the surest first
