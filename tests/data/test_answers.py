"""Answers and questions as they are compared: a table by hand, and the published normaliser's own output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medclip.data.answers import normal_answer, normal_question

DATA = Path(__file__).parents[3] / "shared" / "data"

# What the published normaliser (MEVF, tools/compute_softscore.py) makes of each, but for the last four.
ANSWERS = {
    # articles and case
    "Yes": "yes",
    "NO ": "no",
    "The extremities": "extremities",
    "a mass in the left lung": "mass in left lung",
    "An abscess": "abscess",
    "Theta": "theta",
    # digits
    "One": "1",
    "ten": "10",
    "None": "0",
    "zero": "0",
    "just one": "just 1",
    "Twelve": "twelve",
    "someone": "someone",
    # x ray
    "X-ray": "xray",
    "x ray": "xray",
    "Chest x-ray": "chest xray",
    "X-ray plain film": "xray plain film",
    "X-Rays": "xrays",
    # punctuation
    "enlarged, fluid-filled": "enlarged fluid filled",
    "extra-axial and at the right choroidal fissure": "extra axial and at right choroidal fissure",
    "On the right shoulder.": "on right shoulder",
    "retroperitoneum; retroperitoneal space": "retroperitoneum retroperitoneal space",
    "MRI/FLAIR": "mri flair",
    "MR - ADC Map": "mr adc map",
    "10-20 minutes": "10 20 minutes",
    "Oculomotor nerve (CN III)": "oculomotor nerve cn iii",
    "Air?": "air",
    "Congenital? History, past manipulation?": "congenital history past manipulation",
    "Chronic sinusitis vs. hemorrhage": "chronic sinusitis vs hemorrhage",
    'the "bat wing" sign': "bat wing sign",
    # numbers with points and commas, and what they do to the other marks
    "3.4 cm": "3.4 cm",
    "6.5 x 6.2 x 8.8cm": "6.5 x 6.2 x 8.8cm",
    "1,200 ml": "1200 ml",
    "1,200 ml/day": "1200 mlday",
    "5%": "5%",
    # contractions
    "cant tell": "can't tell",
    "It isnt seen": "it isn't seen",
    "Don't know": "don't know",
    "the patient's left": "patient's left",
    # spaces
    "Heart \tlungs": "heart lungs",
    " superficial to the patient's skin": "superficial to patient's skin",
    # here: kept, where nothing would be left; words of their own; without any of two apostrophes
    "A": "a",
    "max ray": "max ray",
    "IM injection": "im injection",
    "they couldntve": "they couldn't've",
}


@pytest.mark.parametrize(("given", "normal"), ANSWERS.items(), ids=repr)
def test_the_table_of_answers(given: str, normal: str) -> None:
    assert normal_answer(given) == normal
    assert normal_answer(normal) == normal


def test_numbers_as_answers() -> None:
    assert [normal_answer(value) for value in (2, 1.5, True)] == ["2", "1.5", "true"]


@pytest.mark.parametrize("nothing", ["", " ", "?", "...", "-"])
def test_no_word_is_no_answer_and_no_question(nothing: str) -> None:
    assert normal_answer(nothing) == ""
    assert normal_question(nothing) == nothing.strip("?. ")


@pytest.mark.parametrize(
    ("given", "normal"),
    {
        "Is this a chest X ray?": "is this a chest x-ray",
        "Are the lungs normal appearing?": "are the lungs normal appearing",
        "What is the patient's age?": "what is the patient 's age",
        "Is there a mass? -yes/no": "is there a mass",
        "Where is it? - Open": "where is it",
        "Is it wide, or not...": "is it wide or not",
        "Is it larger than 3.4 cm?": "is it larger than 3.4 cm",  # published: 34
        "  What\tis\nthis ": "what is this",
    }.items(),
)
def test_questions_are_words_between_spaces(given: str, normal: str) -> None:
    assert normal_question(given) == normal == normal_question(normal).replace("  ", " ")


@pytest.mark.skipif(not DATA.is_dir(), reason="the sample data is not beside the checkout")
def test_the_published_vocabulary_of_vqa_rad_is_left_as_it_is() -> None:
    published = json.loads((DATA / "vqa_rad" / "answer_all_list.json").read_text())
    assert len(published) == 458 and [normal_answer(answer) for answer in published] == published
    rows = [json.loads(line) for line in (DATA / "vqa_rad" / "qa.jsonl").read_text().splitlines()]
    # Each of the training answers is in that list by the rules, and not by lower case alone.
    answers = [row["answer"] for row in rows if row["official_split"] == "train"]
    found = [sum(rule(answer) in published for answer in answers) for rule in (normal_answer, str.lower)]
    assert found[0] == len(answers) > found[1] + 150
    # Words as MEVF's own dictionary counts them on these questions.
    assert len({word for row in rows for word in normal_question(row["question"]).split()}) == 1043
