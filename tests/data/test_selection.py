"""Filter, split and keep-list: the right samples, groups whole, answers kept, one line where nothing is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medclip.data.bad import BadSample
from medclip.data.raw import Source
from medclip.data.selection import apply_split, read_keys
from medclip.data.sources import open_sources
from medclip.data.tables import TableSource
from medclip.types import UserError


def table(folder: Path, rows: list[dict[str, Any]], **config: Any) -> Source:
    lines = [
        orjson.dumps({"image": f"{i}.jpg", "caption": f"c {i}", "key": f"k{i}"} | row) for i, row in enumerate(rows)
    ]
    (folder / "t.jsonl").write_bytes(b"\n".join(lines))
    return open_sources([{"table": str(folder / "t.jsonl"), "name": "T"} | config], index=folder / "index")[0]


def keys(source: Source) -> list[str]:
    return [source.key(i) for i in range(len(source))]


def test_filter_equals_a_loop(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [{"n": int(rng.integers(9)), "who": str(rng.choice(["a", "b"]))} for _ in range(1200)]
    found = table(tmp_path, rows, filter='n > 3 and who == "a" and caption != "c 7"')
    assert keys(found) == [f"k{i}" for i, r in enumerate(rows) if r["n"] > 3 and r["who"] == "a" and i != 7]


def test_answers_are_kept_for_the_same_question_and_the_same_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    fields = TableSource.fields
    monkeypatch.setattr(TableSource, "fields", lambda self, i: asked.append(i) or fields(self, i))
    rows = [{"n": i} for i in range(10)]
    for expected in (10, 10):  # the second time nobody is asked
        assert len(table(tmp_path, rows, filter="n > 3")) == 6
        assert len(asked) == expected
    assert len(table(tmp_path, rows, filter="n > 4")) == 5 and len(asked) == 20  # another question
    assert len(table(tmp_path, [{"n": 9}] * 10, filter="n > 3")) == 10 and len(asked) == 30  # other data


def test_an_outage_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = TableSource.fields

    def failing(self: TableSource, i: int) -> dict[str, Any]:
        if i == 5:
            raise BadSample("read error", "storm")
        return fields(self, i)

    rows = [{"n": i} for i in range(10)]
    with monkeypatch.context() as patch:
        patch.setattr(TableSource, "fields", failing)
        found = table(tmp_path, rows, filter="n > 3")
        assert "k5" not in keys(found) and [(k, r) for k, r, _ in found.problems] == [("k5", "read error")]
    assert "k5" in keys(table(tmp_path, rows, filter="n > 3"))


def test_unknown_field_lists_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"source T: no sample has the field 'patiant'; the fields are: key, caption, image, "
    ):
        table(tmp_path, [{"patient": 1, "deep": {"er": 2}}], filter='patiant == "x"')
    with pytest.raises(UserError, match=r"deep\.er"):
        table(tmp_path, [{"patient": 1, "deep": {"er": 2}}], filter="deep.err == 2")
    # A field that some samples have is none to complain of.
    assert keys(table(tmp_path, [{"p": 1}, {}, {"p": None}], filter="p is None")) == ["k1", "k2"]


def test_nothing_left_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"source T is empty: none of its 3 samples passes the filter 'n > 9'"):
        table(tmp_path, [{"n": 1}] * 3, filter="n > 9")
    with pytest.raises(UserError, match="falls into part test"):
        table(tmp_path, [{"n": 1}] * 3, split={"by": "n", "part": "test", "fraction": 0.001})


# Split


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from("abcdefghijklmnop"), min_size=2, max_size=80),
    st.floats(0.05, 0.95),
    st.integers(0, 5),
)
def test_no_group_is_in_both_parts_and_every_sample_in_one(
    tmp_path_factory, groups: list[str], fraction: float, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("split")
    source = table(folder, [{"case": g} for g in groups])
    parts = {}
    for part in ("train", "test"):
        try:
            chosen = apply_split(source, {"by": "case", "part": part, "fraction": fraction, "seed": seed}, folder)
            parts[part] = {chosen.key(i): groups[int(chosen.key(i)[1:])] for i in range(len(chosen))}
        except UserError as error:
            assert "falls into part" in str(error)
            parts[part] = {}
    assert not set(parts["train"].values()) & set(parts["test"].values())
    assert sorted([*parts["train"], *parts["test"]]) == sorted(keys(source))


def test_share_is_right_on_average_and_seeds_differ(tmp_path: Path) -> None:
    rows = [{"case": f"p{i // 3}"} for i in range(3000)]
    split = {"by": "case", "part": "test", "fraction": 0.2}
    chosen = [set(keys(table(tmp_path, rows, split=split | {"seed": s}))) for s in (0, 1)]
    assert all(0.16 < len(c) / 3000 < 0.24 for c in chosen)
    assert len(chosen[0] & chosen[1]) < 0.4 * len(chosen[0])


def test_a_group_keeps_its_part_when_others_come_and_go(tmp_path: Path) -> None:
    rows = [{"case": f"p{i}"} for i in range(60)]
    split = {"by": "case", "part": "test", "fraction": 0.3}
    before = {r["case"] for r in (table(tmp_path, rows, split=split).fields(i) for i in range(10))}
    more = table(tmp_path, [{"case": f"new{i}"} for i in range(20)] + rows[::-1], split=split)
    assert before <= {more.fields(i)["case"] for i in range(len(more))}


@pytest.mark.parametrize(
    ("split", "says"),
    [
        ({"by": "nosuch"}, "3 of 3 samples have no 'nosuch'; the fields are"),
        ({"by": "some"}, "2 of 3 samples have no 'some'"),
        ({"part": "validation"}, "part is train or test"),
        ({"fraction": 1.5}, "between 0 and 1"),
        ({"fraction": "a fifth"}, "numbers"),
        ({"on": "case"}, r"unknown keys \['on'\]"),
        ("case", "split is 'case': write"),
    ],
)
def test_bad_splits_get_one_line(tmp_path: Path, split: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        table(tmp_path, [{"some": 1}, {}, {"some": None}], split=split)


# Keep-lists


@pytest.mark.parametrize("kind", ["parquet", "npy", "bytes", "txt"])
def test_keep_lists_of_every_kind(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    wanted = ["k8", "k1", "kü", "k1", "k3"]
    path = tmp_path / f"keep.{'npy' if kind == 'bytes' else kind}"
    if kind == "parquet":
        pd.DataFrame({"score": range(5), "key": wanted}).to_parquet(path)
    elif kind == "txt":
        path.write_text("\ufeff" + "\r\n".join(wanted) + "\r\n", "utf-8")
    else:
        np.save(path, np.array([w.encode() for w in wanted] if kind == "bytes" else wanted))
    assert read_keys(str(path)) == wanted
    found = table(tmp_path, [{} for _ in range(10)], keep=str(path))
    assert keys(found) == ["k1", "k3", "k8"]  # in the source's order, each once
    assert "1 of the 4 keys" in caplog.text


def test_keep_lists_that_do_not_fit(tmp_path: Path) -> None:
    (tmp_path / "none.txt").write_text("other-1\nother-2\n")
    with pytest.raises(UserError, match=r"none of its 2 samples is among the 2 keys.*'k0' here and 'other-1' there"):
        table(tmp_path, [{}, {}], keep=str(tmp_path / "none.txt"))
    (tmp_path / "x.csv").write_text("k0")
    with pytest.raises(UserError, match="unknown ending"):
        table(tmp_path, [{}], keep=str(tmp_path / "x.csv"))
    with pytest.raises(UserError, match="cannot read keep-list"):
        table(tmp_path, [{}], keep=str(tmp_path / "missing.parquet"))
    pd.DataFrame({"id": ["k0"]}).to_parquet(tmp_path / "id.parquet")
    with pytest.raises(UserError, match="column `key`"):
        table(tmp_path, [{}], keep=str(tmp_path / "id.parquet"))
    np.save(tmp_path / "o.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot read keep-list"):
        table(tmp_path, [{}], keep=str(tmp_path / "o.npy"))


def test_all_three_together(tmp_path: Path) -> None:
    rows = [{"n": i, "case": f"p{i % 40}"} for i in range(400)]
    (tmp_path / "keep.txt").write_text("\n".join(f"k{i}" for i in range(0, 400, 2)))
    split = {"by": "case", "part": "train", "fraction": 0.5}
    alone = set(keys(table(tmp_path, rows, split=split)))
    found = keys(table(tmp_path, rows, filter="n >= 100", split=split, keep=str(tmp_path / "keep.txt")))
    assert found == [f"k{i}" for i in range(100, 400, 2) if f"k{i}" in alone]
