"""Questions about images: every figure by hand, and the controls by models that look, or read, or do not."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.text import BLEUScore

from medclip.evals.bootstrap import Bootstrap
from medclip.evals.closed_questions import ClosedQuestions
from medclip.evals.records import records, to_json
from medclip.evals.report import write_report
from medclip.evals.result import Result
from medclip.evals.run import evaluate_checkpoint, kind_of, make_report, run_evaluation
from medclip.evals.vqa import Vqa
from medclip.evals.vqa_bleu import BleuCounts
from medclip.evals.vqa_controls import QUESTION_ONLY, SHUFFLED, controls
from medclip.evals.vqa_details import VqaDetails
from medclip.evals.vqa_gallery import by_word, grid, pictures
from medclip.evals.vqa_outcomes import Question, VqaOutcomes, parts_of
from medclip.evals.vqa_predictions import plain, table
from medclip.types import UserError
from tests.evals.eval_toys import ColourClip
from tests.evals.thorax_toys import BandClassifier
from tests.evals.vqa_toys import ANSWERS, ColourVqa, QuestionSet, Row, rows

FEW = Bootstrap(samples=200)


def answered(model: ColourVqa, asked: Sequence[Row | None], **options) -> Result:
    return Vqa(QuestionSet(asked), name="q", **options)(model, batch_size=4)


def details(result: Result) -> VqaDetails:
    assert isinstance(result.details, VqaDetails)
    return result.details


SIX = [
    Row("a", "red", "which colour", "red", "open", "colour", "head"),
    Row("a", "red", "is it blue", "no", "closed", "check", "head"),
    Row("b", "green", "which colour", "green", "open", "colour", "chest"),
    Row("b", "green", "is it green", "yes", "closed", "check, colour", "chest"),
    Row("c", "blue", "where is it", "bottom right", "open", "place", "chest"),
    Row("c", "blue", "is it red", "no", "closed", "check", "chest"),
]


def test_accuracies_by_true_type_by_hand() -> None:
    # A blind one takes all for red: "is it blue" and "is it red" are said right by chance, "green" and the place wrong.
    result = answered(ColourVqa(looks=False), SIX)
    assert result.metrics["acc1"] == pytest.approx(2 / 6)
    assert result.metrics["closed_accuracy"] == pytest.approx(1 / 3)  # blue: no; green: "no" is wrong; red: "yes" is
    assert result.metrics["open_accuracy"] == pytest.approx(1 / 3)
    assert math.isnan(result.metrics["routing_accuracy"])
    assert result.metrics["acc1:kind: check"] == pytest.approx(1 / 3)
    assert result.metrics["acc1:kind: colour"] == pytest.approx(1 / 3)  # two open ones and "check, colour"
    assert result.metrics["acc1:kind: place"] == 0
    assert result.metrics["acc1:organ: head"] == 1 and result.metrics["acc1:organ: chest"] == 0
    assert not any("modality" in metric for metric in result.metrics)
    assert result.outcomes.groups == ["a", "a", "b", "b", "c", "c"]
    assert result.skipped == {"broken image": 1}
    found = details(result)
    assert (found.images, found.questions, found.answers) == (3, {"closed": 3, "open": 3}, 6)


def test_a_question_led_astray_counts_where_it_belongs() -> None:
    seeing = answered(ColourVqa(routes=True), SIX).metrics
    assert seeing["acc1"] == pytest.approx(5 / 6) and seeing["routing_accuracy"] == 1
    astray = answered(ColourVqa(routes={"is it green", "which colour"}), SIX)
    # Two open questions and a closed one go the wrong way, and have no right answer there.
    assert astray.metrics["routing_accuracy"] == pytest.approx(3 / 6)
    assert astray.metrics["open_accuracy"] == 0 and astray.metrics["closed_accuracy"] == pytest.approx(2 / 3)
    assert isinstance(astray.outcomes, VqaOutcomes)
    assert astray.outcomes.routed == ["closed", "closed", "closed", "open", "open", "closed"]


def test_an_answer_is_its_words_whichever_branch_it_came_from() -> None:
    both = ["closed: yes", "closed: no", "open: no", "open: red", "open: green", "open: blue"]
    asked = [*SIX, Row("d", "red", "is it green", "no", "open")]  # an open question whose answer is "no"
    for names in (both, [name.rpartition(": ")[2] for name in ANSWERS]):
        assert answered(ColourVqa(answers=names), asked).metrics["acc1"] == pytest.approx(6 / 7)


def test_answers_that_the_model_does_not_have_are_counted_and_wrong() -> None:
    found = details(answered(ColourVqa(), [*SIX, *SIX[4:5]]))
    assert found.unknown == 2 and found.unknown_answers == [("bottom right", 2)]
    few = answered(ColourVqa(answers=["closed: yes", "closed: no"]), SIX)
    assert details(few).unknown == 3 and few.metrics["open_accuracy"] == 0 and few.metrics["closed_accuracy"] == 1


def test_chance_is_the_most_frequent_answer_of_each_type() -> None:
    result = answered(ColourVqa(), SIX)  # "closed: yes" and "open: red" come first
    assert details(result).majority == {"closed": "yes", "open": "red"}
    assert "training" in details(result).majority_of
    assert result.chance["acc1"] == pytest.approx(2 / 6)
    assert result.chance["closed_accuracy"] == result.chance["open_accuracy"] == pytest.approx(1 / 3)
    assert result.chance["acc1:organ: head"] == 1 / 2 and result.chance["routing_accuracy"] == 1 / 2
    # One list does not say which answers are closed: these very questions do.
    bare = answered(ColourVqa(answers=["yes", "no", "red", "green", "blue"]), [*SIX, SIX[2]])
    assert details(bare).majority == {"closed": "no", "open": "green"} and "these" in details(bare).majority_of
    assert bare.chance["acc1"] == pytest.approx((2 + 2) / 7)


def test_several_right_answers() -> None:
    asked = [Row("a", "red", "which colour", "crimson #red", "open"), SIX[4]]
    assert answered(ColourVqa(), asked).metrics["acc1"] == 0
    result = answered(ColourVqa(), asked, several="#")
    assert result.metrics["acc1"] == 1 / 2 and result.metrics["bleu1"] > 0
    assert details(result).unknown == 1


# --- BLEU -------------------------------------------------------------------------------------------------------------

GIVEN = ["the cat is on the mat", "left lung", "yes", "right upper lobe of the lung", "axial"]
RIGHT = ["there is a cat on the mat", "left lower lung", "yes", "right upper lobe of the lung", "coronal plane"]


def test_bleu_of_the_documentation() -> None:
    """torchmetrics' own example, in its documentation: 0.7598."""
    counts = BleuCounts.of(["the cat is on the mat"], [("there is a cat on the mat", "a cat is on the mat")])
    assert counts.bleu(4, np.ones((1, 1)))[0] == pytest.approx(0.7598, abs=5e-5)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_bleu_is_torchmetrics_under_any_weights(n: int) -> None:
    counts = BleuCounts.of(GIVEN, [(right,) for right in RIGHT])
    weights = np.array([[1, 1, 1, 1, 1], [0, 2, 1, 3, 0], [3, 0, 0, 1, 1], [0, 1, 1, 0, 2]], dtype=float)
    for row, value in zip(weights, counts.bleu(n, weights), strict=True):
        drawn = [i for i, count in enumerate(row.astype(int)) for _ in range(count)]
        expected = BLEUScore(n_gram=n)([GIVEN[i] for i in drawn], [[RIGHT[i]] for i in drawn])
        longest = max(len(RIGHT[i].split()) for i in drawn)
        assert value == pytest.approx(float(expected), abs=1e-6) if longest >= n else math.isnan(value)


def test_bleu_is_of_open_answers_alone() -> None:
    asked = [SIX[0], SIX[2], SIX[4]]
    closed = [Row("e", "red", "is it red", "yes", "closed")] * 5
    alone, beside = answered(ColourVqa(), asked).metrics, answered(ColourVqa(), [*asked, *closed]).metrics
    given = BLEUScore(n_gram=1)(["red", "green", "no"], [["red"], ["green"], ["bottom right"]])
    assert alone["bleu1"] == beside["bleu1"] == pytest.approx(float(given), abs=1e-6)
    assert alone["bleu2"] == 0 and math.isnan(alone["bleu3"])  # no right answer has three words


# --- Controls ---------------------------------------------------------------------------------------------------------


def test_a_model_that_ignores_the_image_is_as_good_without() -> None:
    result = answered(ColourVqa(looks=False), rows(12))
    for control in (QUESTION_ONLY, SHUFFLED):
        for metric in ("acc1", "closed_accuracy", "open_accuracy"):
            assert result.metrics[f"{metric}:{control}"] == result.metrics[metric]
    report = make_report({"blind": {"q": result}}, settings=FEW)
    for found in controls(report.comparisons["q"], 0.95)["blind"].values():
        assert found["acc1"].added.value == 0 and found["acc1"].added.verdict == "no change beyond chance"


def test_a_model_that_looks_loses_without_the_right_image() -> None:
    result = answered(ColourVqa(), rows(24))
    assert result.metrics["acc1"] == 1
    # Grey is nearest to one of the colours: that one's third, and the closed ones that it happens to get.
    assert result.metrics[f"open_accuracy:{QUESTION_ONLY}"] == pytest.approx(1 / 3)
    assert 0 < result.metrics[f"open_accuracy:{SHUFFLED}"] < 0.7
    report = make_report({"looks": {"q": result}}, settings=FEW)
    added = controls(report.comparisons["q"], 0.95)["looks"][QUESTION_ONLY]["open_accuracy"].added
    assert added.value == pytest.approx(2 / 3) and added.verdict == "gain" and 0.3 < added.low < added.high <= 1


def test_a_model_that_ignores_the_question_is_not_as_good_without_the_image() -> None:
    """It answers "is it red" whatever is asked; so only the image tells its yes from its no."""
    asked = [Row(f"im-{i}", ("red", "blue")[i % 2], "is it red", ("yes", "no")[i % 2], "closed") for i in range(20)]
    result = answered(ColourVqa(reads=False), asked)
    assert result.metrics["acc1"] == 1
    assert result.metrics[f"acc1:{QUESTION_ONLY}"] == 1 / 2
    assert result.metrics[f"acc1:{SHUFFLED}"] < 0.9


def test_the_difference_is_paired() -> None:
    """Both rise and fall with the images drawn; of the paired difference, which is 1 at each image, nothing is left."""
    result = answered(ColourVqa(), [row for row in rows(30) if row.type == "open"])
    outcomes = result.outcomes
    assert isinstance(outcomes, VqaOutcomes)
    wrong = [q.answer if i % 2 else "x" for i, q in enumerate(outcomes.questions)]
    none = replace(result, outcomes=replace(outcomes, given=wrong, controls={QUESTION_ONLY: wrong}))
    added = controls(make_report({"m": {"q": none}}, settings=FEW).comparisons["q"], 0.95)["m"][QUESTION_ONLY]["acc1"]
    assert added.estimate.high - added.estimate.low > 0.2
    assert (added.added.low, added.added.high) == (0, 0)


def test_controls_are_left_out_if_wanted_and_with_one_image() -> None:
    model = ColourVqa()
    result = answered(model, SIX, controls=False)
    assert details(result).controls == [] and not any(QUESTION_ONLY in metric for metric in result.metrics)
    assert details(answered(ColourVqa(), SIX[:2])).controls == [QUESTION_ONLY]


def test_what_the_model_sees_without_the_image() -> None:
    model = ColourVqa()
    answered(model, SIX)
    passes = [part for part in model.seen if len(part) in (4, 2)]
    grey = torch.cat(passes[2:4])
    assert (grey == 128).all() and grey.shape == (6, 3, 32, 32)  # 0.5 in all channels is what it is normalised by
    real, shuffled = torch.cat(passes[:2]), torch.cat(passes[4:6])
    same = [(a == b).all().item() for a, b in zip(real, shuffled, strict=True)]
    assert not any(same)
    assert torch.equal(shuffled[0], shuffled[1])  # both questions about an image get the same other one


# --- Which models, which samples --------------------------------------------------------------------------------------


def test_kinds_of_models_and_evaluations() -> None:
    assert [kind_of(m) for m in (ColourVqa(), ColourClip(), BandClassifier())]  # pyright: ignore[reportArgumentType] == ["vqa", "clip", "classifier"]
    evals = {"q": Vqa(QuestionSet(SIX), name="q")}
    with pytest.raises(UserError, match="'q' is for VQA models, but this checkpoint is a CLIP"):
        evaluate_checkpoint(ColourClip(), evals)  # pyright: ignore[reportArgumentType]
    other = {"c": ClosedQuestions(QuestionSet(SIX), name="c")}
    with pytest.raises(UserError, match="'c' is for CLIPs, but this checkpoint is a VQA model: leave one of them out"):
        evaluate_checkpoint(ColourVqa(), other)  # pyright: ignore[reportArgumentType]


def test_samples_without_a_question() -> None:
    result = answered(ColourVqa(), [None, *SIX, None])
    assert result.skipped == {"broken image": 1, "no question": 2} and len(result.outcomes.keys) == 6
    assert result.outcomes.keys == [f"k{i}" for i in range(1, 7)]
    with pytest.raises(UserError, match=r"'q' has nothing to evaluate \(1 broken image, 1 no question\).*questions: …"):
        answered(ColourVqa(), [None])


def test_a_type_classifier_answers_nothing() -> None:
    with pytest.raises(UserError, match=r"'q': the checkpoint tells closed from open.*model.types=CHECKPOINT"):
        answered(ColourVqa(answers=["closed", "open"]), SIX)


def test_a_broken_model() -> None:
    model = ColourVqa()
    whole = model.answer
    model.answer = lambda batch: whole(batch)._replace(scores=torch.full((len(batch["image"]), 6), torch.nan))  # type: ignore[method-assign]
    with pytest.raises(UserError, match="answers NaN"):
        answered(model, SIX)


def test_questions_about_an_image_are_drawn_together() -> None:
    """Ten questions about each of 40 images, all right or all wrong: as uncertain as 40 answers, not as 400."""
    right = np.random.default_rng(0).random(40) < 0.5
    asked = [
        Row(f"p{n}", "red", "which colour", "red" if ok else "green", "open")
        for n, ok in enumerate(right)
        for _ in range(10)
    ]
    evals = {"q": Vqa(QuestionSet(asked), name="q", controls=False)}
    report = run_evaluation({"x": ColourVqa()}, evals, settings=Bootstrap(samples=2000))  # pyright: ignore[reportArgumentType]
    own = report.comparisons["q"].rows[0].estimates["x"]
    p = right.mean()
    assert own.high - own.low == pytest.approx(2 * 1.96 * np.sqrt(p * (1 - p) / 40), rel=0.1)


def test_parts_are_named_where_there_are_several() -> None:
    asked = [
        Question("1", "a", "?", "x", "open", "POS, PRES", "head"),
        Question("2", "a", "?", "x", "open", "PRES", "head"),
        Question("3", "a", "?", "x", "open", "", "head"),
    ]
    assert [(part.label, part.questions) for part in parts_of(asked)] == [("kind: POS", 1), ("kind: PRES", 2)]


# --- What is shown ----------------------------------------------------------------------------------------------------


def test_gallery() -> None:
    result = answered(ColourVqa(looks=False), rows(30))
    found = details(result)
    assert len(found.right) == len(found.wrong) == 6
    assert [e.type for e in found.right] == [e.type for e in found.wrong] == 3 * ["closed", "open"]
    for example, right in [(e, True) for e in found.right] + [(e, False) for e in found.wrong]:
        assert (example.guesses[0][0] == example.answer) == right
        assert example.guesses[0][1] == pytest.approx(1 / (1 + math.exp(-2)))
        assert len(example.pictures) == 1 + 2  # the image, and a glimpse each
        words = example.question.split()
        assert example.words == [*words, "(no word)"]
        assert example.shares[0] == pytest.approx([0] * (len(words) - 1) + [1, 0])  # looks at the last word
        assert example.shares[1] == pytest.approx([1 / 6] * len(words) + [(6 - len(words)) / 6])
    # The same questions whoever answers, as far as they answer alike.
    seeing = details(answered(ColourVqa(), rows(30)))
    assert seeing.wrong == [] and {e.key for e in found.right} & {e.key for e in seeing.right}


def test_the_grid_of_objects() -> None:
    assert [grid(v) for v in (1, 2, 4, 5, 49, 50, 51, 197)] == [
        None,
        None,
        (2, 0),
        (2, 1),
        (7, 0),
        (7, 1),
        None,
        (14, 1),
    ]
    image = torch.full((3, 32, 32), 90, dtype=torch.uint8)
    attention = np.zeros((6, 5, 3))
    attention[:, 4] = 1 / 3  # behind a class token: the lower right cell
    plain, *glimpses = (decoded(picture) for picture in pictures(image, attention))
    assert len(glimpses) == 4
    for glimpse in glimpses:
        change = np.abs(glimpse.astype(int) - plain).sum(axis=2)
        assert change[120:, 120:].mean() > 10 * change[:60, :60].mean() + 1
    assert len(pictures(image, attention[:, :1])) == 1


def decoded(jpeg: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(jpeg)))


def test_shares_of_words() -> None:
    attention = np.zeros((1, 2, 4))
    attention[0] = [[0.1, 0.2, 0, 0], [0.3, 0, 0.2, 0.2]]
    words, shares = by_word(attention, ["", "left", "lung", ""])
    assert words == ["left", "lung", "(no word)"] and shares[0] == pytest.approx([0.2, 0.2, 0.6])
    assert by_word(np.full((2, 1, 4), 0.25), ["a", "b", "c", ""]) == ([], [])  # nothing to tell
    assert by_word(attention, ["of", "another", "length"]) == ([], [])


def test_predictions_and_formulas() -> None:
    asked = [Row("=cmd|' /C calc'!A1", "red", "which colour", "red", "open"), SIX[1]]
    result = answered(ColourVqa(routes={"which colour"}), asked)
    assert isinstance(result.outcomes, VqaOutcomes)
    found = list(csv.DictReader(io.StringIO(table(result.outcomes))))
    assert found[1] == {
        "id": "q1",
        "image": "a",
        "question": "is it blue",
        "type": "closed",
        "answer": "no",
        "predicted": "no",
        "score": "0.880797",
        "routed": "closed",
        "right": "1",
    }
    assert found[0]["image"] == "'=cmd|' /C calc'!A1" and (found[0]["routed"], found[0]["right"]) == ("closed", "0")
    for cell in ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "＝1"):
        assert plain(cell) == "'" + cell
    assert plain("left-sided = 3") == "left-sided = 3"


def test_records_and_report(tmp_path: Path) -> None:
    evals = {"q": Vqa(QuestionSet([*rows(24), SIX[4]]), name="q")}
    models = {"blind": ColourVqa(looks=False), "sees": ColourVqa(routes=True)}
    report = run_evaluation(models, evals, settings=FEW)  # pyright: ignore[reportArgumentType]
    json.loads(to_json(report))
    blind, sees = records(report)
    assert sees["questions"] == {"closed": 24, "open": 25} and sees["unknown"] == 1 and sees["images"] == 25
    assert sees["metrics"]["routing_accuracy"] == 1 and math.isnan(blind["metrics"]["routing_accuracy"])
    left = sees["controls"][QUESTION_ONLY]["open_accuracy"]
    assert left["value"] + left["image_adds"]["value"] == pytest.approx(sees["metrics"]["open_accuracy"])
    assert sees["per_organ"]["head"]["questions"] == 24 and sees["per_kind"]["place"]["acc1"]["value"] == 0
    page = write_report(report, tmp_path).read_text()
    assert page.count("= as good without") == 6 and page.count("▲ image helps") == 6
    assert "cannot give the right answer to 1 of 49 questions" in page
    assert page.count('class="asked"') == sum(
        len(part) for r in report.comparisons["q"].results.values() for part in (details(r).right, details(r).wrong)
    )
    assert {path.name for path in tmp_path.glob("*.csv")} == {"predictions-q-blind.csv", "predictions-q-sees.csv"}


def test_words_of_strangers_are_escaped(tmp_path: Path) -> None:
    asked = [Row("a", "red", "which <script>", "<b>", "open", "<i>"), Row("b", "red", "is it", "yes", "closed", "x")]
    report = make_report({"m": {"q": answered(ColourVqa(), asked)}}, settings=FEW)
    page = write_report(report, tmp_path).read_text()
    assert "<script>" not in page and "<b></b>" not in page and "which &lt;script&gt;" in page and "&lt;i&gt;" in page
