"""Harrell's concordance index: how often who is at higher risk has the event first."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def cindex(
    risk: Float[np.ndarray, " n"], time: Float[np.ndarray, " n"], event: Float[np.ndarray, " n"]
) -> float | None:
    """Share of the comparable pairs that are in order, equal risks counting half; None where no pair is comparable.

    A pair is comparable if the earlier of its times is that of an event; of equal times, if one is an event and the
    other is not, which then lived on (Harrell et al. 1982; as lifelines and scikit-survival count).
    """
    first = (time[:, None] < time[None, :]) | ((time[:, None] == time[None, :]) & (event[None, :] == 0))
    pairs = first & (event[:, None] == 1)
    if not pairs.any():
        return None
    order = np.sign(risk[:, None] - risk[None, :])
    return float(((order + 1) / 2)[pairs].mean())
