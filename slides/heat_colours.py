"""Values to colours, and what a legend must say of it.

Only maps of even perceived lightness that colour-blind people read as well (matplotlib's; Smith & van der Walt 2015,
Nuñez et al. 2018 for cividis; ColorBrewer's RdBu and PuOr around 0). Others, jet for one, show edges where there are
none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from slides.errors import SlideError

SEQUENTIAL = ("viridis", "magma", "inferno", "plasma", "cividis")
DIVERGING = ("RdBu_r", "PuOr_r")  # high is red, or orange


@dataclass(frozen=True)
class Scale:
    """Which values have which colours.

    Args:
        low: that has the first colour; lower ones too.
        high: that has the last.
        palette: one of `SEQUENTIAL` or `DIVERGING`.
        said: where `low` and `high` come from, for the legend.
    """

    low: float
    high: float
    palette: str
    said: str

    def colour(self, values: np.ndarray) -> np.ndarray:
        """uint8 (…, 3) RGB of values (…); of NaN the first colour, which nobody should show."""
        share = (np.nan_to_num(np.asarray(values, np.float64), nan=self.low) - self.low) / (self.high - self.low)
        return table(self.palette)[np.rint(np.clip(share, 0, 1) * 255).astype(np.uint8)]


@cache
def table(palette: str) -> np.ndarray:
    """uint8 (256, 3) RGB.

    Raises:
        SlideError: no such palette here.
    """
    if palette not in (*SEQUENTIAL, *DIVERGING):
        raise SlideError(f"palette {palette!r}: choose one of {', '.join((*SEQUENTIAL, *DIVERGING))}")
    from matplotlib import colormaps  # here: it takes a while, which `--help` need not wait

    return np.asarray(np.rint(colormaps[palette].resampled(256)(np.arange(256))[:, :3] * 255), np.uint8)


def make_scale(
    values: np.ndarray,
    palette: str = "viridis",
    *,
    percentiles: Sequence[float] = (1, 99),
    limits: Sequence[float] | None = None,
) -> Scale:
    """The scale of a map.

    Args:
        values: of the patches, any shape; what is not finite does not count.
        palette: a diverging one is centred on 0: its ends are as far from it as the farther of both would be.
        percentiles: of the values, which become the ends.
        limits: the ends themselves, so that maps of several slides can be compared.

    Raises:
        SlideError: an unknown palette, ends that do not ascend, or no value.
    """
    table(palette)
    centred = palette in DIVERGING
    if limits is not None:
        low, high = map(float, _pair(limits, "limits"))
        if centred and low != -high:
            raise SlideError(f"limits {low:g} to {high:g}: {palette} is centred on 0: give -x and x, or take viridis")
        return Scale(low, high, palette, "fixed scale")
    first, last = _pair(percentiles, "percentiles")
    if not 0 <= first < last <= 100:
        raise SlideError(f"percentiles {first:g} and {last:g}: choose two of 0 to 100")
    finite = np.asarray(values, np.float64)[np.isfinite(values)]
    if not len(finite):
        raise SlideError("no value is finite: there is nothing to draw")
    low, high = (float(value) for value in np.percentile(finite, (first, last)))
    said = (
        "least to greatest value" if (first, last) == (0, 100) else f"percentiles {first:g} to {last:g}"
    ) + " of this slide"
    if centred:
        high = max(abs(low), abs(high))
        low = -high
        said += ", centred on 0"
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):  # all alike: the middle colour, not a division by 0
        room = max(abs(low), 1e-6) * 0.5
        low, high, said = low - room, high + room, "all values alike"
    return Scale(low, high, palette, said)


def _pair(values: Sequence[float], name: str) -> tuple[float, float]:
    try:
        low, high = (float(value) for value in values)
    except (TypeError, ValueError):
        raise SlideError(f"{name} is {values!r}: give two numbers, e.g. [0, 1]") from None
    if not low < high or not np.isfinite([low, high]).all():
        raise SlideError(f"{name} is [{low:g}, {high:g}]: the first number must be below the second")
    return low, high
