"""Names of slides: what is refused, and keys that webdataset splits where they should be split."""

from __future__ import annotations

import os

import pytest

from slides.entry import Entry, member_name
from slides.errors import SlideError


@pytest.mark.parametrize("name", ["", "  ", ".hidden", "a/b", "a\\b", "a\nb", "x" * 181, "胃" * 61])
def test_what_is_no_name_is_refused_with_its_file(name: str) -> None:
    with pytest.raises(SlideError, match=r"^/data/7\.svs: .*in the column slide$"):
        Entry(name, "/data/7.svs")


def test_names_with_spaces_dots_and_unicode_are_fine() -> None:
    for name in ("Fall 7 – Übersicht 胃 (2)", "TCGA-3C-AALI-01Z-00-DX1.F6E9A5DF", "x" * 180):
        assert Entry(name, "a.svs").slide == name


def test_a_name_in_another_encoding_is_one_line() -> None:
    path = os.fsdecode(b"/data/\xdcbersicht.svs")
    with pytest.raises(SlideError, match=r"dcbersicht\.svs': its name is not UTF-8: rename"):
        Entry("fine", path)


def test_a_key_has_no_dot_so_that_its_ending_begins_at_the_first() -> None:
    assert member_name("TCGA.1.svs", 512, -7) == "TCGA-1-svs_512_-7"
