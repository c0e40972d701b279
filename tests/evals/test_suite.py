"""Averages over tasks against hand-made numbers, and their intervals against the formula for independent samples."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from medclip.evals.bootstrap import Bootstrap
from medclip.evals.classification import ClassificationOutcomes
from medclip.evals.closed_questions import ClosedQuestionsOutcomes
from medclip.evals.records import suites_json
from medclip.evals.result import Result
from medclip.evals.retrieval import RetrievalOutcomes
from medclip.evals.run import Report, make_report
from medclip.evals.suite import Suite, suite_lines
from medclip.types import UserError

SETTINGS = Bootstrap(samples=4000)


def classification(right: list[bool], labels: list[int] | None = None, *, domain: str = "pathology", groups=None):
    labels = labels or [n % 2 for n in range(len(right))]
    logits = np.eye(2)[[label if ok else 1 - label for label, ok in zip(labels, right, strict=True)]]
    keys = [f"k{n}" for n in range(len(right))]
    outcomes = ClassificationOutcomes(keys, groups or keys, np.array(labels), logits)
    return Result("zeroshot_classification", "domain", ("acc1",), outcomes, None, {}, {}, domain=domain)


def retrieval(text_rank: list[int], image_rank: list[int]) -> Result:
    keys = [f"k{n}" for n in range(len(text_rank))]
    bearer = np.arange(len(keys))
    outcomes = RetrievalOutcomes(keys, keys, np.array(text_rank), np.array(image_rank), bearer)
    return Result("zeroshot_retrieval", "domain", ("acc1",), outcomes, None, {}, {}, domain="radiology")


def questions(right: list[bool]) -> Result:
    keys = [f"k{n}" for n in range(len(right))]
    outcomes = ClosedQuestionsOutcomes(keys, keys, ["cells"] * len(right), np.array(right))
    return Result("closed_questions", "domain", ("acc1",), outcomes, None, {}, {}, domain="pathology")


def report(*suites: Suite, **models: dict[str, Result]) -> Report:
    return make_report(models, settings=SETTINGS, suites=suites)


def test_means_by_hand() -> None:
    base = {
        "a": classification([True, False, False, False]),  # 1/4
        "b": questions([True, True, False, False]),  # 1/2
        "c": retrieval([1, 2, 3, 1], [1, 9, 9, 9]),  # (1/2 + 1/4) / 2 = 3/8
        "other": classification([True, True]),
    }
    adapted = {
        "a": classification([True, True, True, False]),
        "b": questions([True, True, True, True]),
        "c": retrieval([1, 1, 1, 1], [1, 1, 9, 9]),
        "other": classification([False, False]),
    }
    suite = Suite("mine", ("a", "b", "c", "absent"), core=("a", "c", "absent"))
    found = report(suite, base=base, adapted=adapted).suites["mine"]
    assert (found.present, found.missing) == (["a", "b", "c"], ["absent"])
    assert {k: m.tasks for k, m in found.domains.items()} == {"pathology": ["a", "b"], "radiology": ["c"]}
    assert found.metrics["c"] == ("text_retrieval_recall@1", "image_retrieval_recall@1")
    means = {"all": found.overall, "core": found.core} | found.domains
    by_hand = {
        "all": ((1 / 4 + 1 / 2 + 3 / 8) / 3, (3 / 4 + 1 + 3 / 4) / 3),
        "core": ((1 / 4 + 3 / 8) / 2, 3 / 4),
        "pathology": (3 / 8, 7 / 8),
        "radiology": (3 / 8, 3 / 4),
    }
    for name, (first, second) in by_hand.items():
        mean = means[name]
        assert mean is not None
        assert mean.estimates["base"].value == pytest.approx(first, abs=1e-15)
        assert mean.estimates["adapted"].value == pytest.approx(second, abs=1e-15)
        assert list(mean.differences) == ["adapted"]
        assert mean.differences["adapted"].value == pytest.approx(second - first, abs=1e-15)


def test_a_suite_may_count_classifications_by_another_metric() -> None:
    lopsided = {"a": classification([True, True, True, False], labels=[0, 0, 0, 1])}
    by = {
        m: report(Suite("s", ("a",), m), x=lopsided).suites["s"].overall.estimates["x"].value for m in ("acc1", "auroc")
    }
    assert by["acc1"] == 3 / 4
    recall = report(Suite("s", ("a",), "mean_per_class_recall"), x=lopsided).suites["s"]
    assert recall.overall.estimates["x"].value == 1 / 2


def test_intervals_are_those_of_independent_tasks() -> None:
    """Three tasks of the very same outcomes: were their resamples one, the mean would be as uncertain as each."""
    rng = np.random.default_rng(0)
    right = [bool(x) for x in rng.random(400) < 0.6]
    tasks = {name: classification(right) for name in ("a", "b", "c")}
    made = report(Suite("s", ("a", "b", "c")), Suite("one", ("a",)), x=tasks)
    p, n = sum(right) / 400, 400
    for suite, count in (("one", 1), ("s", 3)):
        own = made.suites[suite].overall.estimates["x"]
        assert own.high - own.low == pytest.approx(2 * 1.96 * math.sqrt(p * (1 - p) / n / count), rel=0.08)
    alone, own = made.comparisons["a"].rows[0].estimates["x"], made.suites["one"].overall.estimates["x"]
    assert (own.low, own.high) == (alone.low, alone.high)  # the order of resamples does not change one task's interval


def test_differences_are_paired() -> None:
    right = [bool(x) for x in np.random.default_rng(1).random(200) < 0.5]
    better = [True] * 10 + right[10:]  # at least as good everywhere
    tasks = {"a": classification(right), "b": classification(right[::-1])}
    same = report(Suite("s", ("a", "b")), base=tasks, same=tasks).suites["s"].overall.differences["same"]
    assert (same.low, same.high, same.verdict) == (0, 0, "no change beyond chance")
    adapted = {"a": classification(better), "b": classification(right[::-1])}
    made = report(Suite("s", ("a", "b")), base=tasks, adapted=adapted).suites["s"].overall
    change, width = made.differences["adapted"], made.estimates["base"].high - made.estimates["base"].low
    assert change.verdict == "gain" and change.high - change.low < width / 3  # unpaired it would be wider than each


def test_a_task_that_cannot_be_resampled_leaves_no_interval() -> None:
    tasks = {"a": classification([True, False]), "b": classification([True, False], groups=["one", "one"])}
    own = report(Suite("s", ("a", "b")), x=tasks).suites["s"].overall.estimates["x"]
    assert own.value == 0.5 and math.isnan(own.low) and math.isnan(own.high)


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        ({"tasks": ()}, "at least one"),
        ({"tasks": ("a", "a")}, "name each evaluation once"),
        ({"tasks": ("a",), "metric": "brier"}, "suites.s.metric=brier: choose one of acc1"),
    ],
)
def test_bad_suites_get_one_line(suite: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Suite("s", **suite)


def test_a_suite_of_nothing_is_an_error() -> None:
    with pytest.raises(UserError, match="none of its 1 tasks was evaluated"):
        report(Suite("s", ("b",)), x={"a": classification([True, False])})


def test_what_is_written_says_what_is_missing() -> None:
    tasks = {"a": classification([True, False], groups=["one", "one"])}
    made = report(Suite("s", ("a", "b", "c")), x=tasks)
    written = json.loads(suites_json(made.suites))["s"]
    assert written["missing"] == ["b", "c"]
    assert written["overall"]["estimates"]["x"] == {"value": 0.5, "low": None, "high": None}
    first = suite_lines(made.suites["s"]).splitlines()[0]
    assert first == "suite s: mean of 1 tasks of 3; INCOMPLETE, without b, c"
