"""The bootstrap against a plain loop, its coverage on a simulated case, and what grouping and pairing do to it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from medclip.evals.bootstrap import Bootstrap, difference, draws, group_weights, interval
from medclip.evals.metrics import class_recall, confusion, macro, weighted_mean


def mean_of(x: np.ndarray):
    return lambda weights: {"mean": weighted_mean(x, weights)}


def test_equal_to_a_loop_over_resampled_groups() -> None:
    rng = np.random.default_rng(0)
    groups = [f"p{i}" for i in rng.integers(0, 12, 60)]
    labels, predicted = rng.integers(0, 3, 60), rng.integers(0, 3, 60)

    def values(weights: np.ndarray) -> dict[str, np.ndarray]:
        return {"balanced": macro(class_recall(confusion(labels, predicted, 3, weights)))}

    got = draws(values, groups, Bootstrap(samples=40, seed=7))["balanced"]
    names = sorted(set(groups))
    members = {name: [i for i, g in enumerate(groups) if g == name] for name in names}
    rng = np.random.default_rng(7)
    for value in got:
        chosen = [i for g in rng.integers(0, len(names), len(names)) for i in members[names[g]]]
        assert value == pytest.approx(balanced_accuracy_score(labels[chosen], predicted[chosen]), abs=1e-12)


def test_the_same_rows_whatever_the_chunk() -> None:
    groups = list("aabbbcdde")
    whole = np.vstack(list(group_weights(groups, 25, 3)))
    pieces = np.vstack(list(group_weights(groups, 25, 3, chunk_cells=20)))
    np.testing.assert_array_equal(whole, pieces)
    assert whole.shape == (25, 9)
    np.testing.assert_array_equal(whole[:, 0], whole[:, 1])  # both of group a


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_intervals_cover_the_truth_as_often_as_they_say(level: float) -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(300):
        patients = rng.normal(size=60)  # the truth is 0; three images share their patient's effect
        x = np.repeat(patients, 3) + rng.normal(scale=0.5, size=180)
        drawn = draws(mean_of(x), [str(i // 3) for i in range(180)], Bootstrap(samples=300, seed=trial))["mean"]
        low, high = interval(drawn, level)
        covered += low <= 0 <= high
    error = math.sqrt(level * (1 - level) / 300)
    assert covered / 300 == pytest.approx(level, abs=0.015 + 3 * error)


def test_grouping_widens_intervals_of_samples_that_resemble_each_other() -> None:
    rng = np.random.default_rng(2)
    x = np.repeat(rng.normal(size=40), 5)
    widths = {}
    for kind, groups in {"image": [str(i) for i in range(200)], "patient": [str(i // 5) for i in range(200)]}.items():
        low, high = interval(draws(mean_of(x), groups, Bootstrap(samples=2000))["mean"], 0.95)
        widths[kind] = high - low
    assert widths["patient"] / widths["image"] == pytest.approx(math.sqrt(5), rel=0.15)  # the design effect


def test_pairing_finds_a_change_that_separate_intervals_hide() -> None:
    rng = np.random.default_rng(3)
    base = rng.normal(size=200)
    adapted = base + 0.1 + rng.normal(scale=0.05, size=200)
    groups = [str(i) for i in range(200)]
    drawn = [draws(mean_of(x), groups, Bootstrap())["mean"] for x in (base, adapted)]
    assert interval(drawn[0], 0.95)[1] > interval(drawn[1], 0.95)[0]  # they overlap
    change = difference(base.mean(), adapted.mean(), *drawn, level=0.95)
    assert change.verdict == "gain"
    assert 0.08 < change.low < change.value < change.high < 0.12
    assert change.p == pytest.approx(2 / 1001)
    assert difference(base.mean(), adapted.mean(), *drawn, level=0.95, lower_is_better=True).verdict == "loss"


def test_equal_checkpoints_do_not_differ() -> None:
    x = np.random.default_rng(4).normal(size=50)
    drawn = draws(mean_of(x), [str(i) for i in range(50)], Bootstrap())["mean"]
    same = difference(x.mean(), x.mean(), drawn, drawn, level=0.95)
    assert (same.value, same.low, same.high, same.p, same.verdict) == (0, 0, 0, 1, "no change beyond chance")


def test_false_alarms_are_as_rare_as_the_level_says() -> None:
    rng = np.random.default_rng(5)
    groups = [str(i) for i in range(80)]
    alarms = 0
    for trial in range(300):
        both = [draws(mean_of(rng.normal(size=80)), groups, Bootstrap(200, seed=trial))["mean"] for _ in range(2)]
        alarms += difference(0, 0, *both, level=0.95).verdict != "no change beyond chance"
    assert alarms / 300 == pytest.approx(0.05, abs=0.015 + 3 * math.sqrt(0.05 * 0.95 / 300))


def test_one_group_gives_no_interval_and_no_verdict() -> None:
    assert draws(mean_of(np.arange(5.0)), ["a"] * 5, Bootstrap()) == {}
    assert all(math.isnan(v) for v in interval(None, 0.95))
    change = difference(0.1, 0.9, None, None, level=0.95)
    assert change.verdict == "no change beyond chance"
    assert math.isnan(change.p)


def test_resamples_where_the_metric_is_undefined_are_left_out() -> None:
    low, high = interval(np.array([np.nan, 1.0, 2.0, 3.0]), 0.5)
    assert (low, high) == (1.5, 2.5)
