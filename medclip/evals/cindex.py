"""Survival: Harrell's concordance index under sample weights, and the Kaplan-Meier curve."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

_CELLS = 1 << 23  # pairs held at once: 64 MiB


def concordance(
    risk: Float[np.ndarray, " n"],
    time: Float[np.ndarray, " n"],
    event: Float[np.ndarray, " n"],
    weights: Float[np.ndarray, "b n"],
) -> Float[np.ndarray, " b"]:
    """How often who is at higher risk has the event first, of the comparable pairs; equal risks count half.

    A pair (i, j) is comparable if i has the event, and before j's time, or at the same time at which j is censored
    (Harrell et al. 1982). A pair weighs the product of its weights, so that whole-number weights give the index of the
    data with each sample repeated so often. NaN where no pair is left.
    """
    good, pairs = np.zeros((2, len(weights)))
    seen = np.flatnonzero(event == 1)
    step = max(1, _CELLS // max(1, len(risk)))
    for start in range(0, len(seen), step):
        rows = seen[start : start + step]
        comparable = (time[rows, None] < time) | ((time[rows, None] == time) & (event == 0))
        in_order = comparable * (np.sign(risk[rows, None] - risk) + 1) / 2
        own = weights[:, rows]
        good += ((own @ in_order) * weights).sum(axis=1)
        pairs += ((own @ comparable.astype(np.float64)) * weights).sum(axis=1)
    return np.divide(good, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)


def kaplan_meier(time: Float[np.ndarray, " n"], event: Float[np.ndarray, " n"]) -> list[tuple[float, float]]:
    """(time, share without the event from then on) at 0 and at each event, and last at the longest time known.

    The product over event times t of 1 - d_t / n_t: d_t events among the n_t who were followed until t (Kaplan and
    Meier 1958).
    """
    curve, share = [(0.0, 1.0)], 1.0
    for t in np.unique(time[event == 1]):
        share *= 1 - float(((time == t) & (event == 1)).sum()) / float((time >= t).sum())
        curve.append((float(t), share))
    return [*curve, (float(time.max(initial=0.0)), share)]
