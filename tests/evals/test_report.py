"""Comparison, results.json and the page, from two colour models of unequal skill."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from medclip.evals.bootstrap import Bootstrap
from medclip.evals.closed_questions import ClosedQuestions
from medclip.evals.compare import compare
from medclip.evals.console import headline_table
from medclip.evals.report import ONE_FILE, pages, render, summary, unique_slugs, write_report
from medclip.evals.result import LABELS, ClassificationDetails, FewShotDetails, ShotRow
from medclip.evals.retrieval import Retrieval
from medclip.evals.run import Report, evaluate_checkpoint, make_report, run_evaluation
from medclip.evals.suite import Suite
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


class QuestionSet(ColourSet):
    """A colour set that asks two questions of each square."""

    def __init__(self, patients: int, seed: int) -> None:
        super().__init__(patients, seed=seed)
        for _, _, meta in self.rows:
            own = meta["label"]
            first = {"question": "Which <i>colour</i>?", "options": ["red", "green", "blue"], "answer": own}
            second = {"question": "", "options": [own, "dark"], "answer": own}
            meta["raw"] = {"colour": first, "tone": second}


def many_report(models: dict[str, float], count: int = 9, patients: int = 8) -> Report:
    """Evaluations of three kinds and four domains in a suite that lacks a task; some names need escaping."""
    evals = {}
    for i in range(count):
        name, data = f"task/{i}", ColourSet(patients, seed=i)
        if i % 4 == 3:
            evals[name] = Retrieval(data, name=name)
        elif i % 4 == 2:
            data = QuestionSet(patients, i)
            evals[name] = ClosedQuestions(data, name=name, questions=["colour", "tone"])
        else:
            role = "retention" if i % 8 == 0 else "domain"
            evals[name] = ZeroShotClassification(data, name=name, templates=["a {c} square", "{c}"], role=role)
    results = {}
    for model, skill in models.items():
        found = evaluate_checkpoint(ColourClip(skill), evals, batch_size=16)  # type: ignore[arg-type]
        domains = ("pathology", "radiology", "eyes & ears", "skin")
        results[model] = {
            k: replace(r, domain=domains[i % 4], source="confirmed") for i, (k, r) in enumerate(found.items())
        }
    suite = Suite("all9", (*evals, "absent"), core=("task/0", "task/1"))
    return make_report(results, settings=SETTINGS, suites=[suite])


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


def test_many_evaluations_get_a_page_each_and_all_links_lead_somewhere(tmp_path: Path) -> None:
    many = many_report({"base": 0.1, "adapted": 0.5})
    assert len(many.comparisons) > ONE_FILE
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "gone.html").write_text("of an earlier report")
    first = write_report(many, tmp_path)
    texts = {path: path.read_text() for path in (first, *(tmp_path / "tasks").iterdir())}
    assert sorted(path.name for path in texts) == ["report.html", *(f"task-{i}.html" for i in range(9))]
    reached = set()
    for path, text in texts.items():
        page = Page(text)
        assert page.open == [] and len(page.ids) == len(set(page.ids))
        assert "http" not in text and "script" not in page.tags and "url(" not in text
        assert "<i>colour" not in text
        for address in page.addresses:
            if address.startswith("#"):
                assert address[1:] in page.ids
            elif not address.startswith("data:"):
                target = (path.parent / address).resolve()
                assert target in {own.resolve() for own in texts}
                reached.add((path.name, target.name))
    assert {to for place, to in reached if place == "report.html"} == {f"task-{i}.html" for i in range(9)}
    assert ("task-4.html", "task-3.html") in reached and ("task-4.html", "task-5.html") in reached
    assert "Which &lt;i&gt;colour&lt;/i&gt;?" in texts[tmp_path / "tasks" / "task-2.html"]
    # A report of few evaluations into the same folder is one file again.
    write_report(colour_report({"base": 0.2, "adapted": 0.9}), tmp_path)
    assert list((tmp_path / "tasks").iterdir()) == []


def test_the_first_page_grows_by_little_with_each_evaluation() -> None:
    """Pictures and tables are on the pages of tasks: forty evaluations of three checkpoints stay near 150 kB."""
    sizes = [
        len(
            dict(pages(many_report({"base": 0.1, "adapted": 0.5, "blend": 0.3}, count, patients=3)))[
                "report.html"
            ].encode()
        )
        for count in (8, 16)
    ]
    assert (sizes[1] - sizes[0]) / 8 < 4500
    assert "data:image" not in dict(pages(many_report({"base": 0.1}, 8, patients=3)))["report.html"]


def test_a_suite_is_drawn_with_its_numbers_and_says_what_it_lacks() -> None:
    many = many_report({"base": 0.1, "adapted": 0.5})
    text = render(many)
    suite = many.suites["all9"]
    assert "Incomplete: no result of this suite." in text and "absent" in text
    panel = text[text.index('<section class="panel suite"') : text.index("Its tasks, and what each counts by")]
    for mean in (suite.overall, suite.core, *suite.domains.values()):
        assert mean is not None
        for e in mean.estimates.values():
            assert f"<b>{e.value:.3f}</b>" in panel
    assert panel.count("<polygon") == 4 + 2 and ">eyes &amp; ears</text>" in panel
    # Bars are as long as the means: twice the value, twice the width.
    widths = [float(w) for w in re.findall(r'<rect class="m\d" [^>]*width="([\d.]+)%"', panel)]
    means = (suite.overall, *suite.domains.values(), *([suite.core] if suite.core else []))
    values = [e.value for mean in means for e in mean.estimates.values()]
    assert np.allclose(np.array(widths) / widths[0], np.array(values) / values[0], rtol=2e-3)
    assert max(widths) <= 100


def test_one_domain_or_one_checkpoint_needs_no_radar_and_no_change() -> None:
    results = {"only": many_report({"base": 0.3}, 4).comparisons}
    single = make_report(
        {"only": {name: replace(c.any_result, domain="") for name, c in results["only"].items()}},
        settings=SETTINGS,
        suites=[Suite("four", tuple(results["only"]))],
    )
    text = render(single)
    assert "<polygon" not in text and "Change by task" not in text and 'class="tile' not in text
    assert Page(text).open == [] and "Incomplete" not in text


def test_rings_are_changes_within_chance_and_dots_beyond() -> None:
    many = many_report({"base": 0.1, "adapted": 0.5})
    text = render(many)
    figures = "".join(re.findall(r'<ol class="changes">.*?</ol>', text, re.DOTALL))
    shown = [c for role in ("domain", "retention") if len(many.role(role)) > 2 for c in many.role(role)]
    verdicts = [c.headline[0].differences["adapted"].verdict for c in shown]
    rings = len(re.findall(r'<circle class="m1 even"', figures))
    assert rings == verdicts.count("no change beyond chance")
    assert len(re.findall(r'<circle class="m1"', figures)) == len(verdicts) - rings > 0


def test_every_template_is_a_dot_and_the_confusions_are_told() -> None:
    report = colour_report({"base": 0.05, "adapted": 0.9})
    text = render(report)
    strips = re.findall(r'<svg class="strip".*?</svg>', text, re.DOTALL)
    assert [strip.count("<circle") for strip in strips] == [2, 2]
    details = report.comparisons["colours"].results["base"].details
    assert isinstance(details, ClassificationDetails) and details.showcase is not None
    first = details.showcase.confused[0]
    names = list(details.classes)
    assert first.count == details.confusion[names.index(first.truth)][names.index(first.said)]
    assert all(e.truth == first.truth and e.guesses[0][0] == first.said for e in first.examples)
    assert all(e.guesses[0][0] == e.truth for e in details.showcase.right)
    assert all(e.guesses[0][0] != e.truth for e in details.showcase.wrong)
    assert f"<b>{first.truth}</b> taken for <b>{first.said}</b>" in text
    ece = report.comparisons["colours"].results["base"].reliability.ece  # type: ignore[union-attr]
    assert f"ECE {ece:.3f}" in text


def test_curves_over_shots_are_drawn_from_their_draws() -> None:
    """Shots 1, 2, 4 in equal steps; balanced accuracy on an axis from 0.4 to 0.6."""
    rows = [ShotRow("tip", k, 3 * k, [m - 0.05, m + 0.05], m, 0.07) for k, m in ((1, 0.45), (2, 0.5), (4, 0.55))]
    details = FewShotDetails({"red": ["red"]}, ["{c}"], 0.5, rows)
    one = colour_report({"base": 0.2}).comparisons["colours"].results["base"]
    text = render(make_report({"base": {"few": replace(one, task="few_shot", details=details)}}, settings=SETTINGS))
    (chart,) = re.findall(r'<svg class="chart"[^>]*aria-label="tip.*?</svg>', text, re.DOTALL)
    assert 'points="0.0,75.0 50.0,50.0 100.0,25.0"' in chart
    dots = re.findall(r'<circle[^>]*cx="([\d.]+)" cy="([\d.]+)"', chart)
    assert dots == [
        ("0.0", "100.0"),
        ("0.0", "50.0"),
        ("50.0", "75.0"),
        ("50.0", "25.0"),
        ("100.0", "50.0"),
        ("100.0", "0.0"),
    ]
    assert 'y1="50.0"' in re.search(r'<line class="zero.*?/>', chart)[0]  # type: ignore[index]


def test_names_become_files_that_do_not_collide() -> None:
    assert unique_slugs(["a/b", "a b", "A-B", "../x", ""]) == {
        "a/b": "a-b", "a b": "a-b-2", "A-B": "A-B-3", "../x": "-x", "": "-",
    }  # fmt: skip


def test_a_sentence_names_the_largest_of_many() -> None:
    many = many_report({"base": 0.1, "adapted": 0.6}, 24, patients=12)
    line = summary(many)[0]
    gains = [
        (row.differences["adapted"].value, c.name)
        for c in many.role("domain")
        for row in c.headline
        if row.differences["adapted"].verdict == "gain"
    ]
    assert len(gains) > 5 and f"and {len(gains) - 5} more" in line
    assert line.index(max(gains)[1]) < 60


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
