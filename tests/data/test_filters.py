"""Filters against Python's own eval and pandas, and against whatever tries to be more than a filter."""

from __future__ import annotations

import pickle
import re
import time
import warnings
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medclip.data.filters import Filter, has_field, lookup
from medclip.types import UserError

META: dict[str, Any] = {
    "image_primary_label": ["Microscopy", "Plot"],
    "article_license": "CC BY",
    "caption": "A lung  of old",
    "size": [640, 480],
    "n": 3,
    "x": 0.5,
    "none": None,
    "article": {"title": "T", "year": 2020, "deep": {"k": [1, 2]}},
    "dotted.name": "here",
}


@pytest.mark.parametrize(
    "text",
    [
        '"Microscopy" in primary_label and license == "CC BY" and len(caption) > 5',
        '"Microscopy" in image_primary_label',
        'licence != "commercial"',
        "size[0] * size[1] > 300000 and size[-1] == 480",
        "n + 1 == 4 and n - 5 < 0 and n * 2 == 6 and n / 2 == 1.5 and n // 2 == 1 and n % 2 == 1 and -n == -3",
        "1 < n <= 3 != 4",
        'n in [1, 3] and n in (3,) and n in {3} and n not in [4] and not "x" in caption',
        "none is None and n is not None",
        'article.title == "T" and article.year >= 2020 and article["year"] == 2020 and article.deep.k[1] == 2',
        'dotted.name == "here"',
        'startswith(caption, "A") and endswith(caption, "old") and "lung" in lower(caption)',
        '"microscopy" in lower(primary_label)',
        "any(primary_label) and all(size)",
        '(missing or license) == "CC BY"',
        '(missing or "") == ""',
        "(n and x) == 0.5",
        '"lung  of" in caption',  # the space in a string is the string's
        "n == 3\n  and x == 0.5",
        "True",
        'not (n > 5 or "Radiology" in primary_label)',
        'len("日本") == 2 and n == 3',
    ],
)
def test_true_ones(text: str) -> None:
    assert Filter(text)(META) is True
    assert Filter(f"not ({text})")(META) is False


@pytest.mark.parametrize(
    "text",
    [
        "missing > 1", "missing < 1", '"a" in missing', "missing == 1", "len(missing) > 0", "missing + 1 > 0",
        "missing.deeper == 1", "missing[0] == 1", "-missing == 0", "none < 3", '"a" < 3', "caption > 3",
        'caption * 3 == ""', "n / 0 == 0", "n % 0 == 0", "size[7] == 1", 'size["a"] == 1', 'article["none"] == 1',
        "n[0] == 1", 'startswith(n, "3")', "3 in n", "n in caption", "size < 3", "article < article",
    ],
)  # fmt: skip
def test_missing_and_unfit_values_are_false_and_never_err(text: str) -> None:
    assert Filter(text)(META) is False


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')", "open('/etc/passwd')", "().__class__", "caption.__class__", "__class__ == 1",
        "a.__b.c == 1",
        "caption.upper() == 'A'", "len.__call__(n)", "lambda: 1", "[x for x in size]", "{n: 1}", "n if x else 2",
        "n ** 9 > 1", "n << 3 > 1", "n @ x", "n | 1", "~n", "(n := 3)", "f'{n}'", "b'a' == n", "1j == n", "... == n",
        "len(n, x)", "len()", "len(*size)", "len(obj=n)", "size[0:1] == 1", "await n", "yield n", "n; x",
        "n = 3", "n == 0777",
        "import os", "", "   ", "n ==", "(n", "'abc", "n\0 == 1", "print(n)", "[*size] == 1", "lower(n).real == 1",
    ],
)  # fmt: skip
def test_more_than_a_filter_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="filter") as caught:
        Filter(text)
    assert "\n" not in str(caught.value)


def test_refused_before_it_costs_anything() -> None:
    start = time.monotonic()
    for text in (
        "9" * 5000 + " > n",
        "n" + " + 1" * 2000,
        "(" * 500 + "n" + ")" * 500,
        "not " * 900 + "n",
        "-" * 3000 + "1",
    ):
        with pytest.raises(UserError, match="filter"):
            Filter(text)
    assert Filter(f"{'not ' * 90}n")({"n": 1}) is True
    assert Filter("*".join(["9" * 70] * 50) + " > 1")({}) is True  # large, but not without bound
    with pytest.raises(UserError, match="fields: 50 at most"):
        Filter(" or ".join(f"f{i}" for i in range(51)))
    assert time.monotonic() - start < 30  # unrefused, any of them takes minutes or ends the process


def test_message_points_at_the_place() -> None:
    with pytest.raises(UserError, match="⟨here⟩danger"):
        Filter('"ü" in caption and danger(caption)')


def test_names_lookup_and_pickle() -> None:
    made = Filter('license == "x" and article.title == "T" and len(caption) > 1')
    assert made.names == {"license", "article.title", "caption"}
    again = pickle.loads(pickle.dumps(made))
    assert again.text == made.text and again(META) is made(META)
    assert lookup(META, "primary_label") == META["image_primary_label"]
    assert lookup({"license": "own", "article_license": "other"}, "license") == "own"
    assert lookup(META, "article.none") is None and lookup(META, "caption.x") is None
    assert has_field(META, "none") and has_field(META, "journal") is False and has_field(META, "article.deep.k")


# Against pandas, on tables of numbers and words

rows = st.lists(
    st.fixed_dictionaries(
        {
            "a": st.integers(-5, 5),
            "b": st.floats(-2, 2, allow_nan=False).map(lambda v: round(v, 2)),
            "c": st.sampled_from(["red", "green", "blue"]),
        }
    ),
    min_size=1,
    max_size=20,
)
numbers = st.sampled_from(["a", "b", "a + b", "a * 2", "a - 1", "b / 2", "a % 3", "-a", "3"])
compared = st.builds("{} {} {}".format, numbers, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), numbers)
worded = st.sampled_from(['c == "red"', 'c != "blue"', 'c in ["red", "green"]', 'c not in ["blue"]'])
expressions = st.recursive(
    compared | worded,
    lambda inner: (
        st.builds("({} {} {})".format, inner, st.sampled_from(["and", "or"]), inner)
        | st.builds("(not {})".format, inner)
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(rows, expressions)
def test_equals_pandas_query(rows: list[dict[str, Any]], text: str) -> None:
    # pandas' "not" inverts the bits of a bare True (-2, which is true again), so it gets the number as a column.
    frame = pd.DataFrame(rows).assign(three=3)
    expected: Any = frame.eval(re.sub(r"\b3\b", "three", text), engine="python")
    keep = Filter(text)
    assert [keep(row) for row in rows] == [bool(v) for v in expected]


values = st.one_of(
    st.none(), st.booleans(), st.integers(-9, 9), st.text("ab", max_size=3), st.lists(st.integers(0, 3), max_size=3)
)
plain = st.recursive(
    st.sampled_from(["p", "q", "r", "1", '"a"', "[1, 2]", "None"]),
    lambda inner: (
        st.builds("({} {} {})".format, inner, st.sampled_from(["and", "or", "==", "!="]), inner)
        | st.builds("(not {})".format, inner)
        | st.builds("({} is None)".format, inner)
    ),
    max_leaves=9,
)


@settings(max_examples=200, deadline=None)
@given(st.fixed_dictionaries({"p": values, "q": values, "r": values}), plain)
def test_equals_python_where_python_has_a_value(meta: dict[str, Any], text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python finds `1 is None` odd
        expected = bool(eval(text, {"__builtins__": {}}, dict(meta)))
    assert Filter(text)(meta) is expected


@settings(max_examples=300, deadline=None)
@given(
    st.text(st.sampled_from("abn_.()[]{}'\"+-*/%<>=! ,:0129\n\\lambdinotrsyp"), max_size=40),
    st.dictionaries(st.sampled_from("abn"), values),
)
def test_any_text_is_refused_or_gives_a_truth(text: str, meta: dict[str, Any]) -> None:
    try:
        keep = Filter(text)
    except UserError:
        return
    assert keep(meta) in (True, False)
