"""Comparison, results.json and the page, from two colour models of unequal skill."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from medclip.evals.bootstrap import Bootstrap
from medclip.evals.compare import compare
from medclip.evals.console import headline_table
from medclip.evals.report import render, summary, write_report
from medclip.evals.result import LABELS
from medclip.evals.retrieval import Retrieval
from medclip.evals.run import Report, make_report, run_evaluation
from medclip.evals.zeroshot import ZeroShotClassification
from medclip.types import UserError
from tests.evals.eval_toys import ColourClip, ColourSet

SETTINGS = Bootstrap(samples=200)


def colour_report(skills: dict[str, float], classes: dict[str, str] | None = None) -> Report:
    evals = {
        "colours": ZeroShotClassification(
            ColourSet(30), name="colours", classes=classes, templates=["a {c} square", "{c}"]
        ),
        "memory": Retrieval(ColourSet(30, seed=1), name="memory", role="retention"),
    }
    clips = {name: ColourClip(skill) for name, skill in skills.items()}
    return run_evaluation(clips, evals, batch_size=16, settings=SETTINGS)


@pytest.fixture(scope="module")
def report() -> Report:
    return colour_report({"base": 0.2, "adapted": 0.9})


def test_a_better_model_is_a_gain_and_a_worse_one_a_loss(report: Report) -> None:
    row = next(r for r in report.comparisons["colours"].rows if r.metric == "acc1")
    change = row.differences["adapted"]
    assert change.verdict == "gain" and 0 < change.low <= change.value <= change.high
    assert row.estimates["base"].low <= row.estimates["base"].value <= row.estimates["base"].high
    worse = colour_report({"base": 0.9, "adapted": 0.2, "blind": 0.0})
    back = next(r for r in worse.comparisons["colours"].rows if r.metric == "acc1").differences["adapted"]
    assert back.verdict == "loss" and back.value == -change.value  # the same resamples, turned round
    assert (back.low, back.high) == pytest.approx((-change.high, -change.low))
    rank = next(r for r in worse.comparisons["memory"].rows if r.metric == "text_retrieval_median_rank")
    assert rank.differences["blind"].value > 0 and rank.differences["blind"].verdict == "loss"


def test_the_same_model_twice_never_differs() -> None:
    same = colour_report({"base": 0.4, "copy": 0.4})
    for comparison in same.comparisons.values():
        assert {row.differences["copy"].verdict for row in comparison.rows} == {"no change beyond chance"}


def test_checkpoints_judged_on_other_samples_cannot_be_paired(report: Report) -> None:
    one = report.comparisons["colours"].results["base"]
    outcomes = replace(one.outcomes, keys=[*one.outcomes.keys[:-1], "another"])  # type: ignore[type-var]
    with pytest.raises(UserError, match="other samples"):
        compare("colours", {"a": one, "b": replace(one, outcomes=outcomes)}, SETTINGS)


def test_records_are_clip_benchmarks_and_carry_intervals(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    records = json.loads((tmp_path / "results.json").read_text())
    assert [(r["dataset"], r["model"]) for r in records] == [
        ("colours", "base"), ("colours", "adapted"), ("memory", "base"), ("memory", "adapted"),
    ]  # fmt: skip
    for record in records:
        assert record.keys() >= {"dataset", "model", "pretrained", "task", "metrics", "language"}
        for metric, (low, high) in record["intervals"].items():
            assert low <= record["metrics"][metric] <= high
        assert ("comparison" in record) == (record["model"] == "adapted")
        assert record["groups"] == 30 and record["samples"] == 90
    assert {"acc1", "acc5", "mean_per_class_recall"} <= records[0]["metrics"].keys()
    assert records[0]["metrics"]["acc5"] is None
    assert {"image_retrieval_recall@5", "text_retrieval_recall@5"} <= records[2]["metrics"].keys()
    assert records[3]["comparison"]["differences"]["image_retrieval_recall@10"]["verdict"] in (
        "gain", "loss", "no change beyond chance",
    )  # fmt: skip


class Page(HTMLParser):
    """Collects addresses, ids and text, and checks that tags are balanced."""

    void = frozenset({"meta", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href")]
        self.ids += [v or "" for k, v in attrs if k == "id"]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone_is_well_formed_and_escapes(report: Report) -> None:
    text = render(report)
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert {a[1:] for a in page.addresses if a.startswith("#")} <= set(page.ids)
    assert all(a.startswith(("data:image/jpeg;base64,", "#")) for a in page.addresses)
    assert "http" not in text and "script" not in page.tags and "url(" not in text
    assert "&lt;b&gt;light&lt;/b&gt;" in text and "<b>light" not in text  # captions of the set hold markup
    assert "prefers-color-scheme:dark" in text and "width=device-width" in text
    assert text.index('id="domain"') < text.index('id="retention"')
    assert all(LABELS[row.metric] in text for c in report.comparisons.values() for row in c.rows)


def test_the_summary_says_what_changed_and_what_did_not(report: Report) -> None:
    domain, retention = summary(report)
    assert domain.startswith("Gain, adapted against base: better in colours balanced accuracy (+0.")
    assert retention.startswith("Forgetting, adapted against base: ")
    same = summary(colour_report({"base": 0.4, "copy": 0.4}))
    assert same[0].endswith("no change beyond chance in 2 of 2 headline figures.")


def test_one_checkpoint_and_an_undefined_class_make_a_page_too() -> None:
    classes = {"red": "red", "green": "green", "blue": "blue", "dark": "dark"}
    single = colour_report({"checkpoint": 0.9}, classes)
    text = render(single)
    assert "verdict" not in text.split("</style>")[1].lower()
    assert "macro AUROC is undefined</strong> for dark" in text
    assert summary(single) == []


def test_one_group_gives_values_without_intervals() -> None:
    data = ColourSet(4)
    for _, _, meta in data.rows:
        meta["group"] = "one"
    evaluation = ZeroShotClassification(data, name="x", templates=["{c}"])
    report = run_evaluation({"a": ColourClip(), "b": ColourClip(0.1)}, {"x": evaluation}, settings=SETTINGS)
    row = report.comparisons["x"].rows[0]
    assert math.isnan(row.estimates["a"].low) and row.differences["b"].verdict == "no change beyond chance"
    assert "few groups" in render(report)


def test_nothing_to_report_is_said() -> None:
    with pytest.raises(UserError, match="nothing to report"):
        make_report({})


def test_the_console_table_shows_gain_and_forgetting(report: Report) -> None:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(headline_table(report))
    text = console.export_text()
    assert "what was gained" in text and "what was forgotten" in text
    value = report.comparisons["colours"].results["base"].metrics["mean_per_class_recall"]
    assert f"{value:.3f} [" in text and np.isfinite(value)
