"""Requests: every field counts, and what makes no sense is refused in one line."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from slides.errors import SlideError
from slides.request import Request, digest

OTHER: dict[str, Any] = {
    "size": 224, "mpp": 0.25, "overlap": 8, "tolerance": 0.01, "upsample": True, "coverage": 0.4, "tissue": "otsu",
    "tissue_mpp": 4.0, "remove": ("pen", "blur"), "min_area": 1.0, "fill_holes": 1.0, "masks": "m", "classes": ("a",),
    "exclude": ("b",), "exact": True, "icc": True, "stain": "reinhard", "stain_target": "t.png",
}  # fmt: skip


def test_every_field_changes_the_fingerprint() -> None:
    assert set(OTHER) == {field.name for field in fields(Request)}
    prints = {Request(**({name: value} | ({"stain_target": "x"} if name == "stain" else {}))).fingerprint()
              for name, value in OTHER.items()}  # fmt: skip
    assert len(prints | {Request().fingerprint()}) == len(OTHER) + 1
    assert Request().fingerprint() == Request.parse({"remove": ["pen"], "mpp": 0.5}).fingerprint()


def test_a_config_of_lists_and_single_words_is_the_same_request() -> None:
    one = Request.parse({"classes": "Tumour", "exclude": ["Pen"], "remove": []})
    assert one == Request(classes=("Tumour",), exclude=("Pen",), remove=())
    assert Request.parse(one.as_dict()) == one


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"sise": 3}, "unknown keys ['sise']"),
        ({"size": 0}, "size 0"),
        ({"size": 25.5}, "size 25.5"),
        ({"size": 64, "overlap": 64}, "overlap 64"),
        ({"overlap": 0.5}, "overlap 0.5"),
        ({"overlap": -1}, "overlap -1"),
        ({"mpp": 0}, "mpp is 0"),
        ({"mpp": -0.5}, "mpp is -0.5"),
        ({"mpp": float("nan")}, "mpp is nan"),
        ({"mpp": 1000}, "mpp is 1000"),
        ({"mpp": "half"}, "wrong type"),
        ({"size": None}, "size None"),
        ({"coverage": 1.01}, "coverage is 1.01"),
        ({"coverage": float("nan")}, "coverage is nan"),
        ({"coverage": "most"}, "wrong type"),
        ({"tissue": "magic"}, "choose one of robust, otsu, hsv, none"),
        ({"tissue_mpp": 0}, "tissue_mpp is 0"),
        ({"remove": ["pens"]}, "remove names ['pens']"),
        ({"remove": None}, "wrong type"),
        ({"stain": "macenko"}, "stain_target"),
        ({"stain": "mackenzie", "stain_target": "x"}, "choose one of macenko"),
    ],
)
def test_one_line_for_what_makes_no_sense(values: dict[str, Any], says: str) -> None:
    with pytest.raises(SlideError) as error:
        Request.parse(values)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_digest_does_not_depend_on_order() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})
