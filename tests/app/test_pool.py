from __future__ import annotations

from pathlib import Path

import pytest

from medclip.app.pool import SlidePool
from slides.entry import Entry
from slides.errors import SlideError
from tests.slides.toys import toy_slide, truncate


def test_so_many_stay_open_and_none_is_closed_under_a_reader(tmp_path: Path) -> None:
    path = str(toy_slide(tmp_path / "a.svs", 300, 300, downsamples=(1,)).path)
    pool = SlidePool({name: Entry(name, path) for name in "abcd"}, 2)
    with pool.use("a") as held:
        for name in "bcd":
            with pool.use(name) as slide:
                assert slide.read(0, 0, 0, 8, 8).shape == (8, 8, 3)
        assert len(pool) == 2
        held.read(0, 0, 0, 8, 8)  # a closed one would fail: its file is gone
        with pool.use("a") as again:
            assert again is held
    pool.close()
    assert len(pool) == 0
    with pytest.raises(Exception, match=r"cannot be read"):
        held.read(0, 0, 0, 8, 8)


def test_what_is_not_in_the_table_is_not_opened(tmp_path: Path) -> None:
    toy_slide(tmp_path / "b.svs", 300, 300, downsamples=(1,))
    pool = SlidePool({"a": Entry("a", str(tmp_path / "a.svs"))}, 2)
    for name in (str(tmp_path / "b.svs"), "../b", "b"):
        with pytest.raises(KeyError), pool.use(name):
            pass
    with pytest.raises(SlideError, match="no such file"), pool.use("a"):
        pass
    truncate(toy_slide(tmp_path / "a.svs", 300, 300, downsamples=(1,)).path, 0.2)
    with pytest.raises(SlideError), pool.use("a"):
        pass
