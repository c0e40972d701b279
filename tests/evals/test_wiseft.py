"""The scored sweep: the best blend, and the curve of gain against retention."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from medclip.evals.wiseft import Point, Sweep, best_alpha, draw


def test_best_alpha():
    def scores(*values: float) -> dict[float, dict[str, float]]:
        return {i / 2: {"r/acc1": v, "r/text_retrieval_median_rank": v} for i, v in enumerate(values)}

    nan = float("nan")
    assert best_alpha(scores(0.1, 0.3, 0.2), "r/acc1") == 0.5
    assert best_alpha(scores(3, 2, 1), "r/text_retrieval_median_rank", lower_is_better=True) == 1.0
    assert best_alpha(scores(0.1, 0.3, 0.3), "r/acc1") == 0.5  # of equals the one nearer to the base
    assert best_alpha(scores(nan, 0.1, nan), "r/acc1") == 0.5
    assert best_alpha(scores(nan, nan, nan), "r/acc1") is None


def _result(role: str, lower: frozenset[str] = frozenset(), **metrics: float) -> SimpleNamespace:
    return SimpleNamespace(role=role, metrics=metrics, headline=tuple(metrics), lower_is_better=lower)


def _sweep(*, retention: bool) -> Sweep:
    sweep = Sweep()
    for alpha, gain in ((1.0, 0.9), (0.0, 0.5), (0.5, 0.8)):
        results = {
            "organ": _result("domain", acc1=gain, auroc=gain + 0.1),
            "pairs": _result("domain", frozenset({"rank"}), rank=7.0),
        }
        if retention:
            results["figures"] = _result("retention", recall=1 - alpha / 2)
        sweep.add(alpha, results)  # type: ignore[arg-type]
    return sweep


def test_curve_of_gain_against_retention():
    points = _sweep(retention=True).tradeoff()
    expected = [Point(0.0, 1.0, 0.55), Point(0.5, 0.75, 0.85), Point(1.0, 0.5, 0.95)]  # in order; ranks left out
    np.testing.assert_allclose(points, expected)
    assert _sweep(retention=False).tradeoff() == []


@pytest.mark.parametrize("retention, rows, columns", [(False, 1, 3), (True, 2, 4)])
def test_a_panel_each_and_one_for_the_curve(retention: bool, rows: int, columns: int):
    size = Image.open(io.BytesIO(draw(_sweep(retention=retention)))).size
    assert size == (pytest.approx(columns * 3.6 * 120, abs=1), pytest.approx(rows * 3.2 * 120, abs=1))
