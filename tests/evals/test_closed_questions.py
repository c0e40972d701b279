"""Closed questions by hand: which option wins, who is left out, and that an image's questions are drawn together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from medclip.evals.bootstrap import Bootstrap
from medclip.evals.closed_questions import ClosedQuestions
from medclip.evals.records import records
from medclip.evals.result import ClosedQuestionsDetails
from medclip.evals.run import make_report, run_evaluation
from medclip.types import Batch, Preprocess, UserError
from tests.evals.eval_toys import COLOURS, ColourClip

ASKED = {"question": "Which colour?", "options": ["red", "green", "blue"], "answer": "red"}


class Asked:
    """One picture a row of the colour that it names; the row's metadata holds its questions."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self.bad: list[tuple[str, str, str]] = [("x", "broken image", "")]

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, preprocess: Preprocess, batch_size: int, workers: int) -> Iterator[Batch]:
        for start in range(0, len(self.rows), 2):
            part = self.rows[start : start + 2]
            images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
            for i, row in enumerate(part):
                images[i] = torch.tensor(COLOURS[row["colour"]])[:, None, None]
            meta = [
                {"label": None, "captions": [], "group": row.get("patient", f"{start + i}"), "raw": row}
                for i, row in enumerate(part)
            ]
            yield Batch(image=images, key=[f"k{start + i}" for i in range(len(part))], meta=meta)


def answered(rows: list[dict[str, Any]], **options: Any):
    return ClosedQuestions(Asked(rows), name="q", **options)(ColourClip())  # pyright: ignore[reportArgumentType]


def test_the_most_similar_option_wins_and_answers_are_found_by_text_or_number() -> None:
    rows = [
        {"colour": "red"} | ASKED,
        {"colour": "green"} | ASKED,  # wrong: green is seen, red is the answer
        {"colour": "blue", "options": ["red", "blue"], "answer_idx": 1},
    ]
    result = answered(rows)
    assert result.metrics == {"acc1": pytest.approx(2 / 3)}
    assert result.chance["acc1"] == pytest.approx((1 / 3 + 1 / 3 + 1 / 2) / 3)
    assert isinstance(result.details, ClosedQuestionsDetails) and result.details.images == 3
    wrong = result.details.examples[1]
    assert (wrong.question, wrong.answer, wrong.options[0][0]) == ("Which colour?", "red", "green")
    assert wrong.options[0][1] == pytest.approx(1, abs=0.02)


def test_the_template_and_the_words_of_the_question() -> None:
    rows = [{"colour": "red", "question": "dark", "options": ["green square", "crimson square"], "answer_idx": 1}]
    clip = ColourClip()
    seen: list[str] = []
    tokenize = clip.tokenizer.__class__.__call__
    clip.tokenizer = type("T", (), {"context_length": 8, "__call__": lambda s, t: seen.extend(t) or tokenize(s, t)})()  # type: ignore[assignment]
    result = ClosedQuestions(Asked(rows), name="q", template="{question} {option}")(clip)  # pyright: ignore[reportArgumentType]
    assert sorted(seen) == ["dark crimson square", "dark green square"] and result.metrics["acc1"] == 1


def test_several_questions_an_image_by_kind() -> None:
    def row(colour: str, first: str, second: str, **more: Any) -> dict[str, Any]:
        options = ["red", "green", "blue"]
        asked = {"hue": {"options": options, "answer": first}, "tone": {"options": options, "answer": second}}
        return {"colour": colour, "ask": asked | more}

    rows = [row("red", "red", "blue"), row("green", "green", "green"), row("blue", "blue", "red", tone=None)]
    result = answered(rows, questions=["ask.hue", "ask.tone"])
    assert result.metrics == {"acc1": 4 / 5, "acc1:hue": 1, "acc1:tone": 1 / 2}
    assert result.outcomes.keys == ["k0?ask.hue", "k0?ask.tone", "k1?ask.hue", "k1?ask.tone", "k2?ask.hue"]
    assert result.outcomes.groups == ["0", "0", "1", "1", "2"]
    report = make_report({"x": {"q": result}}, settings=Bootstrap(samples=100))
    [record] = records(report)
    assert record["per_kind"]["tone"] == {
        "questions": 2,
        "acc1": {"value": 0.5, "interval": [0.0, 1.0], "chance": pytest.approx(1 / 3)},
    }


def test_kinds_may_be_a_field_of_the_metadata() -> None:
    rows = [{"colour": "red", "domain": "skin"} | ASKED, {"colour": "blue", "domain": "eye"} | ASKED]
    assert answered(rows, kind="domain").metrics == {"acc1": 1 / 2, "acc1:skin": 1, "acc1:eye": 0}


def test_questions_of_one_group_are_drawn_together() -> None:
    """Ten questions of each of 40 patients, all right or all wrong: as uncertain as 40 answers, not as 400."""
    right = np.random.default_rng(0).random(40) < 0.5
    rows = [
        {"colour": "red" if ok else "green", "patient": f"p{n}"} | ASKED
        for n, ok in enumerate(right)
        for _ in range(10)
    ]
    evals = {"q": ClosedQuestions(Asked(rows), name="q")}
    report = run_evaluation({"x": ColourClip()}, evals, settings=Bootstrap(samples=2000))  # pyright: ignore[reportArgumentType]
    own = report.comparisons["q"].rows[0].estimates["x"]
    p = right.mean()
    assert own.high - own.low == pytest.approx(2 * 1.96 * np.sqrt(p * (1 - p) / 40), rel=0.1)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({}, "no question"),
        ({"options": None, "answer": "x"}, "no question"),
        ({"options": "red", "answer": "red"}, "bad options"),
        ({"options": ["red"], "answer": "red"}, "bad options"),
        ({"options": ["red", 3], "answer": "red"}, "bad options"),
        ({"options": ["red", "blue"], "answer": "green"}, "bad answer"),
        ({"options": ["red", "red"], "answer": "red"}, "bad answer"),
        ({"options": ["red", "blue"], "answer_idx": 2}, "bad answer"),
        ({"options": ["red", "blue"], "answer_idx": True}, "bad answer"),
    ],
)
def test_questions_that_are_none_are_counted(asked: dict[str, Any], reason: str) -> None:
    result = answered([{"colour": "red"} | ASKED, {"colour": "green"} | asked])
    assert result.metrics["acc1"] == 1 and result.skipped == {"broken image": 1, reason: 1}
    with pytest.raises(UserError, match=rf"nothing to evaluate \(1 broken image, 1 {reason}\).*evals.q.questions"):
        answered([{"colour": "green"} | asked])


def test_a_template_needs_a_place_for_the_option() -> None:
    with pytest.raises(UserError, match=r"evals.q.template='an image': write \{option\}"):
        ClosedQuestions(Asked([]), name="q", template="an image")
