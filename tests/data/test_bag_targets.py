"""Truth from a row of a table: the rules by hand, bins of time against pandas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from medclip.data.bad import BadSample
from medclip.data.bag_targets import Target, Truth, bin_label, class_names, time_bins, with_strata
from medclip.types import UserError


def label(kind: str, row: dict[str, Any], **labels: Any) -> list[float]:
    return Target.parse(kind, labels).of(row).label.tolist()


def test_labels_by_hand() -> None:
    names = ["low", "mid", "high"]
    assert label("classes", {"label": "mid"}, names=names) == [0, 1, 0]
    assert [label("ordinal", {"label": name}, names=names) for name in names] == [[0, 0], [1, 0], [1, 1]]
    assert label("multilabel", {"label": "high| low"}, names=names) == [1, 0, 1]
    assert label("multilabel", {"label": ""}, names=names) == [0, 0, 0]
    assert label("classes", {"g": 3}, names=["a", "b"], field="g", values={"3": "b"}) == [0, 1]
    # Cuts: a value on a cut is above it, as numpy's digitize has it.
    marks = [-1.0, 0.0, 0.4, 2.0, 5.0]
    found = [label("classes", {"x": x}, names=names, field="x", thresholds=[0, 2]) for x in marks]
    assert np.argmax(found, axis=1).tolist() == np.digitize(marks, [0, 2]).tolist()
    row = {"low": 1, "mid": -1, "high": 0}
    vector = label("multilabel", row, names=[*names, "other"], columns=True)
    assert np.array_equal(vector, [1, np.nan, 0, np.nan], equal_nan=True)


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("classes", {"label": ""}, "no label"),
        ("classes", {"label": "z"}, "bad label"),
        ("survival", {"time": "", "event": 1}, "no label"),
        ("survival", {"time": -1, "event": 1}, "bad label: time is -1"),
        ("survival", {"time": "x", "event": 1}, "bad label"),
        ("survival", {"time": 3, "event": 2}, "bad label: event is 2"),
        ("survival", {"time": float("inf"), "event": 1}, "bad label"),
    ],
)
def test_what_says_nothing_is_a_bad_sample(kind: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        Target.parse(kind, {"names": ["a", "b"]} if kind == "classes" else {}).of(row)


@pytest.mark.parametrize(
    ("kind", "labels", "message"),
    [
        ("classification", {}, "data.target is 'classification': choose of classes"),
        ("classes", {"names": ["a"]}, "needs two classes or more"),
        ("classes", {"names": ["a", "a"]}, "each named once"),
        ("classes", {"names": ["a", "b"], "nmes": 1}, "unknown keys \\['nmes'\\]"),
        ("classes", {"names": ["a", "b"], "thresholds": [1, 2]}, "one cut fewer than classes"),
        ("ordinal", {"names": ["a", "b", "c"], "thresholds": [2, 1]}, "ascending numbers"),
        ("survival", {"values": {"Dead": 2}}, "write {Dead: 1, Alive: 0}"),
        ("survival", {"bins": 0}, "data.labels.bins is 0"),
    ],
)
def test_bad_options_are_refused_in_a_line(kind: str, labels: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        Target.parse(kind, labels)
    assert "\n" not in str(raised.value)


def survival(times: np.ndarray, events: np.ndarray) -> list[Truth]:
    rule = Target.parse("survival", {"values": {"Dead": 1, "Alive": 0}})
    said = np.where(events == 1, "Dead", "Alive")
    return [rule.of({"time": float(t), "event": str(e)}) for t, e in zip(times, said, strict=True)]


def test_bins_of_time_are_quantiles_of_the_events() -> None:
    rng = np.random.default_rng(0)
    times, events = rng.exponential(20, 300), (rng.random(300) < 0.6).astype(int)
    edges = time_bins(survival(times, events), 4)
    pandas: Any = pd  # its stubs know neither
    _, reference = pandas.qcut(times[events == 1], 4, retbins=True)
    assert np.allclose(edges, reference[1:-1])
    bins = [int(np.argmax(bin_label(t, edges))) for t in times]
    cut = pandas.cut(times, [-np.inf, *reference[1:-1], np.inf], right=False, labels=False)
    assert bins == list(cut)
    assert time_bins(survival(times, events), 1) == () and bin_label(3.0, ()).tolist() == [1]
    with pytest.raises(UserError, match="0 events at 0 times"):
        time_bins(survival(times, events * 0), 4)
    with pytest.raises(UserError, match=r"too few for data.labels.bins=4"):
        time_bins(survival(np.full(300, 5.0), events), 4)


def test_strata_go_by_the_rarest_label_that_is_present() -> None:
    rule = Target.parse("multilabel", {"names": ["often", "rare"]})
    truths = [rule.of({"label": text}) for text in ("often", "often", "often|rare", "", "often")]
    assert with_strata(truths, rule) == [0, 0, 1, 2, 0]


def test_class_names_of_a_table(tmp_path: Any) -> None:
    path = tmp_path / "t.csv"
    path.write_text("slide,label,several,grade\na,x,p|q,10\nb,y,q,9\nc,,,\n")
    assert class_names(None, str(path)) == ["x", "y"]
    assert class_names(None, str(path), target="multilabel", field="several") == ["p", "q"]
    assert class_names(None, str(path), target="ordinal", field="grade") == ["9", "10"]  # by size
    assert class_names(None, str(path), values={"x": "tumour", "y": "normal"}) == ["normal", "tumour"]
    assert class_names(thresholds=[1, 2.5]) == ["under 1", "1 to 2.5", "2.5 or more"]
    assert class_names(target="survival", bins=[3, 9]) == ["bin 1", "bin 2", "bin 3"]
    with pytest.raises(UserError, match=r"say the order of the classes, data.labels.names=\[x, y\]"):
        class_names(None, str(path), target="ordinal")
    with pytest.raises(UserError, match=r"no class in the column 'lbl' \(it has slide, label"):
        class_names(None, str(path), field="lbl")
