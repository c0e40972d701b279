"""Where marks go, against places found by hand, and what is picked to be shown."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from medclip.evals.bootstrap import Estimate
from medclip.evals.ranking import chance_recall
from medclip.evals.report_charts import end_of_axis, radar, range_of_axis, recall_curve, share, swarm
from medclip.evals.showcase import confusions, surest

NAN = float("nan")


def pairs(polygon: str) -> list[tuple[float, ...]]:
    return [tuple(map(float, corner.split(","))) for corner in polygon.split()]


def test_a_radar_of_four_has_its_corners_on_the_axes() -> None:
    own = [Estimate(value, value - 0.1, value + 0.1) for value in (0.4, 0.2, 0.1, 0.3)]
    drawn = radar(["up", "right", "down", "left"], [own])
    assert drawn.top == 0.5  # holds 0.4 + 0.1
    (polygon, area), *_ = drawn.shapes
    assert pairs(polygon) == [(0, -80), (40, 0), (0, 20), (-60, 0)]
    assert area is not None and area.count("M") == area.count("Z") == 2
    outer, inner = (part.strip("MZ ").replace(" L", " ") for part in area.split("Z")[:2])
    assert pairs(outer)[0] == (0, -100) and pairs(inner)[2] == (0, 0)
    assert [(name, anchor) for name, _, _, anchor in drawn.names] == [
        ("up", "middle"), ("right", "start"), ("down", "middle"), ("left", "end"),
    ]  # fmt: skip
    assert pairs(drawn.web[-1]) == drawn.spokes


def test_what_is_unknown_lies_at_the_centre_without_an_area() -> None:
    known, unknown = Estimate(0.5, 0.4, 0.6), Estimate(NAN, NAN, NAN)
    (polygon, area), (_, whole) = radar(["a", "b", "c"], [[known, unknown, known], [known] * 3]).shapes
    assert pairs(polygon)[1] == (0, 0) and area is None and whole is not None


@pytest.mark.parametrize(
    ("values", "end"), [([0.051, -0.1], 0.1), ([0.31], 0.4), ([1.0], 1.0), ([3.2], 4.0), ([NAN], 0.01)]
)
def test_an_axis_ends_at_a_round_number_that_holds_all(values: list[float], end: float) -> None:
    assert end_of_axis(values) == end


def test_an_axis_keeps_to_its_values_and_to_the_unit() -> None:
    assert range_of_axis([0.41, 0.58, NAN]) == pytest.approx((0.4, 0.6))
    assert range_of_axis([0.5]) == pytest.approx((0.45, 0.55))
    assert range_of_axis([1.0]) == pytest.approx((0.95, 1.0))
    assert share(0.45, 0.4, 0.6) == 25 and share(-1, 0, 1) == 0 and share(2, 0, 1) == 100


def test_dots_of_a_swarm_keep_their_distance_and_their_order() -> None:
    values = [0.5, 0.5, 0.5, 0.9, 0.505]
    placed = swarm(values, 0, 1, width=2)
    assert [place for place, _ in placed] == [50, 50, 50, 90, 50.5]
    assert [row for _, row in placed] == [0, 1, -1, 0, 2]
    dense = swarm(np.random.default_rng(0).random(200).tolist(), 0, 1, width=2)
    for row in {row for _, row in dense}:
        own = sorted(place for place, other in dense if other == row)
        assert all(b - a >= 2 for a, b in pairwise(own))


def test_a_recall_curve_is_the_share_of_ranks_within_k() -> None:
    ranks = np.array([1, 3, 10, 10])
    curve = recall_curve(ranks, 10)
    assert curve[0] == (0, 0.25) and curve[-1] == (1, 1)
    assert dict(curve)[math.log(5) / math.log(10)] == 0.5
    # Ranks drawn evenly follow chance.
    even = dict(recall_curve(np.arange(1, 101), 100))
    assert even[math.log(10) / math.log(100)] == pytest.approx(chance_recall(np.ones(100, dtype=int), 100, 10))
    assert recall_curve(np.array([1]), 1) == []


LABELS = np.array([0, 0, 0, 1, 1, 1, 2])
LOGITS = np.array(
    [[9, 0, 0], [8, 0, 0], [0, 5, 0], [0, 3, 0], [4, 0, 0], [2, 0, 0], [0, 0, 1]], dtype=float
)  # right 9 8 3 1, wrong: 0 for 1 by 5, 1 for 0 by 4 and 2


def test_the_surest_come_first_a_class_at_a_time() -> None:
    assert surest(LOGITS, LABELS, right=True) == [0, 3, 6, 1]
    assert surest(LOGITS, LABELS, right=False) == [2, 4, 5]
    assert surest(LOGITS, LABELS, right=True, most=2) == [0, 3]
    assert surest(LOGITS[:2], LABELS[:2], right=False) == []


def test_confusions_are_counted_and_the_most_frequent_come_first() -> None:
    first, second = confusions(LOGITS, LABELS)
    assert (first.truth, first.said, first.count, first.places) == (1, 0, 2, [4, 5])
    assert (second.truth, second.said, second.count, second.places) == (0, 1, 1, [2])
    assert confusions(LOGITS[:2], LABELS[:2]) == []
    assert surest(LOGITS[:, :1], np.zeros(7, dtype=int), right=True, most=2) == [0, 1]  # one class alone
