"""Which text comes out: fields, several texts, sentences that fit; and none where there is none."""

from __future__ import annotations

from collections import Counter as Count
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medclip.data.bad import BadSample
from medclip.data.captions import CaptionRule, clean, fit_sentences, sentences
from medclip.data.raw import RawSample
from medclip.types import UserError


class Words:
    """Counts words as tokens, with start and end."""

    context_length = 8

    def count(self, text: str) -> int:
        return 2 + len(text.split())


def raw(text: str | list[str] | None = None, **meta: Any) -> RawSample:
    return RawSample("k", b"", text, meta)


def pick(rule: Any, sample: RawSample, seed: int = 0, tokenizer: Any = None) -> str:
    return CaptionRule.parse(rule).pick(sample, np.random.default_rng(seed), tokenizer)


def test_default_is_the_text_member_with_its_white_space_collapsed() -> None:
    assert pick(None, raw("  A\n lung\t.\r\n", caption="other")) == "A lung ."
    assert CaptionRule.parse(None).needs_text and not CaptionRule.parse(None).needs_meta


def test_fields_of_the_metadata() -> None:
    sample = raw("T", caption="C", article={"title": "N"}, empty="", none=None, number=7)
    assert pick("caption", sample) == "C"
    assert pick({"field": "article.title"}, sample) == "N"
    assert pick(["empty", "none", "absent", "caption"], sample) == "C"
    assert pick("number", sample) == "7"
    assert pick({"fields": ["caption", "txt"], "choose": "first"}, sample) == "C"
    assert pick({"fields": ["caption", "txt"], "choose": "all"}, sample) == "C T"


def test_random_of_several_is_even_and_lists_count_each() -> None:
    sample = raw("a", more=["b", "c", "a"])  # a comes twice, and counts once
    drawn = Count(pick(["txt", "more"], sample, seed) for seed in range(600))
    assert set(drawn) == {"a", "b", "c"} and min(drawn.values()) > 150
    assert CaptionRule.parse(["txt", "more"]).all(sample) == ["a", "b", "c"]


def test_the_same_generator_draws_the_same() -> None:
    sample = raw("x. Y z. A b c. D e f. G h i j. K l m n.", other="q")
    rule = {"fields": ["txt", "other"], "fit": "random"}
    assert [pick(rule, sample, s, Words()) for s in range(40)] == [pick(rule, sample, s, Words()) for s in range(40)]
    assert len({pick(rule, sample, s, Words()) for s in range(40)}) > 3


def test_lines_are_captions_of_their_own() -> None:
    sample = raw("a dog\na cat\n\n")
    assert CaptionRule.parse({"field": "txt", "lines": True}).all(sample) == ["a dog", "a cat"]
    assert CaptionRule.parse("txt").all(sample) == ["a dog a cat"]
    assert {pick({"lines": True}, sample, s) for s in range(30)} == {"a dog", "a cat"}


@pytest.mark.parametrize("text", ["", "  \n", "No caption found", "No caption found.", " no  caption FOUND"])
def test_nothing_said_is_an_empty_caption(text: str) -> None:
    with pytest.raises(BadSample) as caught:
        pick(None, raw(text))
    assert caught.value.reason == "empty caption"
    assert clean("No caption found here") == "No caption found here"


def test_no_text_member_is_a_missing_caption() -> None:
    with pytest.raises(BadSample) as caught:
        pick(None, raw(None))
    assert caught.value.reason == "missing caption"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"feild": "txt"}, "unknown keys.*feild"),
        ({"field": "txt", "choose": "best"}, "random, first or all"),
        ({"field": "txt", "fit": "tight"}, "lead or random"),
        ({"fields": []}, "name at least one"),
        (5, "caption is 5"),
    ],
)
def test_bad_rules_get_one_line(config: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        CaptionRule.parse(config)


# Sentences


def test_sentences_end_where_readers_think_they_do() -> None:
    text = 'CT of 2.5 mm slices (Fig. 3). Arrow: mass, see Smith et al. 2010 and J. Doe! "Benign" was said. ok? T2.'
    assert sentences(text) == [
        "CT of 2.5 mm slices (Fig. 3).",
        "Arrow: mass, see Smith et al. 2010 and J. Doe!",
        '"Benign" was said. ok?',
        "T2.",
    ]


def test_fit_by_hand() -> None:
    text = "One two. Three four. Five six. Seven."
    count = Words().count
    assert fit_sentences(text, count, 6) == "One two. Three four."
    assert fit_sentences(text, count, 9) == text
    assert fit_sentences("a b c d e f g h. Short.", count, 6) == "a b c d e f g h."  # one that is too long comes whole
    seen = {fit_sentences(text, count, 6, np.random.default_rng(s)) for s in range(50)}
    # From the last sentence on there is room before it, which is filled.
    assert seen == {"One two. Three four.", "Three four. Five six.", "Five six. Seven."}


words = st.text("abcdefg", min_size=2, max_size=4)  # one letter and a full stop are an initial
sentence = st.lists(words, min_size=1, max_size=9).map(lambda w: " ".join(w).capitalize() + ".")


@settings(max_examples=200, deadline=None)
@given(st.lists(sentence, min_size=1, max_size=9), st.integers(3, 25), st.one_of(st.none(), st.integers(0, 99)))
def test_what_fits_is_whole_sentences_in_a_row_and_as_many_as_go(
    pieces: list[str], limit: int, seed: int | None
) -> None:
    text, count = " ".join(pieces), Words().count
    got = fit_sentences(text, count, limit, None if seed is None else np.random.default_rng(seed))
    runs = {" ".join(pieces[i:j]): (i, j) for i in range(len(pieces)) for j in range(len(pieces), i, -1)}
    assert got in runs
    assert count(got) <= limit or got in pieces
    if seed is None:
        assert text.startswith(got)
    places = [(i, j) for i in range(len(pieces)) for j in range(i + 1, len(pieces) + 1) if " ".join(pieces[i:j]) == got]
    # Another sentence after it would be too many, at one at least of the places where it stands.
    assert any(j == len(pieces) or count(" ".join(pieces[i : j + 1])) > limit for i, j in places)
    if count(text) <= limit:
        assert got == text
