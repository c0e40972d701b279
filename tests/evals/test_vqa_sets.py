"""Evaluations of public question sets, each on a few rows in its own layout, by a model that sees colours."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from medclip.config import CONF
from medclip.evals.run import evaluate_checkpoint
from medclip.evals.vqa_details import VqaDetails
from medclip.evaluate import build_evals, check_evals
from tests.evals.eval_toys import COLOURS
from tests.evals.vqa_toys import ColourVqa

RAD = {"image_name": "synpic1.jpg", "question": "Which colour?", "answer": "Red", "answer_type": "OPEN"}
SLAKE = {"img_name": "xmlab1/source.jpg", "question": "Which colour?", "answer": "Red", "answer_type": "OPEN"}
# Of each set: the table's place and text, the images' folder and names, and (questions, right ones).
SETS = {
    "vqa_rad": (
        "VQA_RAD Dataset Public.json",
        json.dumps(
            [
                RAD | {"qid": 1, "question_type": "COLOR", "image_organ": "HEAD", "phrase_type": "test_freeform"},
                RAD | {"qid": 2, "question_type": "COLOR", "image_organ": "HEAD", "phrase_type": "freeform"},
                RAD
                | {
                    "qid": 3,
                    "question": "Is it blue?",
                    "answer": "No",
                    "answer_type": "CLOSED ",
                    "question_type": "PRES",
                }
                | {"question_type": "PRES", "image_organ": "CHEST", "phrase_type": "test_para"},
            ]
        ),
        "VQA_RAD Image Folder/synpic1.jpg",
        (2, 2),
    ),
    "slake": (
        "test.json",
        json.dumps(
            [
                SLAKE | {"qid": 1, "q_lang": "en", "content_type": "Color", "location": "Lung", "modality": "CT"},
                SLAKE | {"qid": 2, "q_lang": "zh", "content_type": "Color", "location": "Lung", "modality": "CT"},
                SLAKE
                | {"qid": 3, "q_lang": "en", "answer": "Blue", "content_type": "Color", "location": "Head"}
                | {"modality": "MRI"},
            ]
        ),
        "imgs/xmlab1/source.jpg",
        (2, 1),
    ),
    "vqa_med": (
        "VQAMed2019_Test_Questions_w_Ref_Answers.txt",
        "synpic1|plane|which colour?|crimson#red\nsynpic1|modality|is it blue?|no\nsynpic1|plane|which colour?|blue\n",
        "VQAMed2019_Test_Images/synpic1.jpg",
        (3, 2),
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_layout(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place, text, image, (questions, right) = SETS[name]
    (tmp_path / place).write_text(text)
    (tmp_path / image).parent.mkdir(parents=True)
    red = np.full((32, 32, 3), COLOURS["red"][::-1], np.uint8)
    (tmp_path / image).write_bytes(cv2.imencode(".jpg", red)[1].tobytes())
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("evaluate", [f"eval=[{name}]", f"evals.{name}.root={tmp_path}"])
    check_evals(cfg)
    [result] = evaluate_checkpoint(ColourVqa(), build_evals(cfg)).values()
    assert len(result.outcomes.keys) == questions and len(set(result.outcomes.groups)) == 1
    assert result.metrics["acc1"] == pytest.approx(right / questions) and result.skipped == {}
    assert isinstance(result.details, VqaDetails)
    assert {part.of for part in result.details.parts} == {
        "vqa_rad": {"kind", "organ"},
        "slake": {"organ", "modality"},
        "vqa_med": {"kind"},
    }[name]
