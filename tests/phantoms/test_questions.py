"""Generated questions: answers that are true of the picture, and that the words alone do not tell."""

from __future__ import annotations

from collections import Counter, defaultdict

import cv2
import numpy as np
import pytest

from medclip.data.sources import open_sources
from medclip.phantoms.questions import _CLOSED, _OPEN, COLOURS, VALUES, question_phantom


def seen(image: np.ndarray) -> dict[str, str]:
    """Shape, colour, side and height as they can be measured in the picture."""
    smooth = cv2.GaussianBlur(image, (0, 0), 1.5).astype(float)
    mask = smooth.max(-1) - smooth.min(-1) > 50  # grounds are grey
    colour = smooth[mask].mean(0)
    nearest = min(COLOURS, key=lambda name: np.abs(np.array(COLOURS[name]) - colour).sum())
    y, x = np.argwhere(mask).mean(0) / len(image)
    (outline, *_), _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    fills = cv2.contourArea(outline) / np.prod(cv2.minAreaRect(outline)[1])  # 1/2, pi/4 or 1 of its rectangle
    shape = "triangle" if fills < 0.64 else "disc" if fills < 0.88 else "square"
    side, height = "left" if x < 0.5 else "right", "top" if y < 0.5 else "bottom"
    return {"shape": shape, "colour": nearest, "side": side, "height": height}


@pytest.fixture(scope="module")
def phantoms():
    return [question_phantom(3, i, i // 8, i % 8, 96) for i in range(1600)]


def test_every_answer_is_true_of_the_picture(phantoms) -> None:
    for phantom in phantoms[:400]:
        truth, about = seen(phantom.image), phantom.attributes
        assert truth == {kind: about[kind] for kind in VALUES}
        words = about["question"].lower().replace("?", "").split()
        if about["type"] == "OPEN":
            assert phantom.label == truth[about["kind"]] and about["question"] in _OPEN[about["kind"]]
        else:
            (asked,) = [value for value in VALUES[about["kind"]] if value in words]
            assert phantom.label == ("Yes" if asked == truth[about["kind"]] else "No")


def test_the_words_of_a_question_do_not_tell_its_answer(phantoms) -> None:
    """The best that a table from question to answer can do, made on 200 drawings, for 200 others."""
    others = [question_phantom(4, i, i // 8, i % 8, 64) for i in range(1600)]
    table: dict[str, Counter[str]] = defaultdict(Counter)
    for phantom in phantoms:
        table[phantom.attributes["question"]][phantom.label] += 1
    right = {
        kind: np.mean(
            [
                table[p.attributes["question"]].most_common(1)[0][0] == p.label
                for p in others
                if p.attributes["type"] == kind
            ]
        )
        for kind in ("CLOSED", "OPEN")
    }
    assert right["CLOSED"] < 0.56 and right["OPEN"] < 0.48
    assert len(table) == sum(
        len(texts) * (len(VALUES[kind]) if texts is _CLOSED[kind] else 1)
        for form in (_CLOSED, _OPEN)
        for kind, texts in form.items()
    )


def test_questions_about_one_drawing_share_its_picture_and_go_round(phantoms) -> None:
    for first in range(0, 80, 8):
        about = phantoms[first : first + 8]
        assert all(np.array_equal(one.image, about[0].image) and one.patient == about[0].patient for one in about)
        assert Counter((one.attributes["kind"], one.attributes["type"]) for one in about) == dict.fromkeys(
            ((kind, form) for kind in VALUES for form in ("CLOSED", "OPEN")), 1
        )
    assert len({phantom.image.tobytes() for phantom in phantoms[:400]}) == 50


def test_another_size_shows_the_same_scene() -> None:
    for i in range(8):
        small, large = (question_phantom(0, i, i, 0, size) for size in (96, 288))
        assert small.attributes == large.attributes and small.label == large.label
        assert seen(small.image) == seen(large.image)
        (box,), (wide,) = small.boxes, large.boxes
        assert np.abs(3 * np.array(box[1:]) - np.array(wide[1:])).max() <= 3


def test_as_a_source_they_are_questions_without_another_word(tmp_path) -> None:
    (source,) = open_sources([{"phantoms": {"kind": "questions", "samples": 64, "seed": 3, "per_patient": 8}}])
    raws = [source.read(i, want_meta=True) for i in range(64)]
    assert source.caption.fields == ("vqa.question",)
    slots = Counter(raw.meta["vqa"]["slot"].split(": ")[0] for raw in raws if raw.meta)
    assert slots == {"closed": 32, "open": 32}
    assert len({raw.image for raw in raws}) == 8 == len({raw.meta["vqa"]["image"] for raw in raws if raw.meta})
    assert len({raw.key for raw in raws}) == 64
