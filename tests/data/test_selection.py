"""Filter, split, keep-list, a few: the right samples, groups whole, answers kept, one line where nothing is left."""

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


# A few samples

COLUMNS = {"names": ["A", "B"], "from": "columns", "uncertain": "ignore"}
FINDINGS = {"names": ["A", "B", "C"], "from": "list", "field": "finding", "unlabelled": "todo"}


def findings(n: int = 300, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of three classes, of which C is rare, with none, several or unknown ones; patients have about three."""
    rng = np.random.default_rng(seed)
    share = np.array([0.4, 0.2, 0.05])
    rows = []
    for _ in range(n):
        found = [name for name, present in zip("ABC", rng.random(3) < share, strict=True) if present]
        text = "todo" if rng.random() < 0.1 else "|".join(found) or "No Finding"
        rows.append({"finding": text, "patient": f"p{rng.integers(n // 3)}"})
    return rows


def chosen(source: Source, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [rows[int(key[1:])] for key in keys(source)]


def test_k_of_classes_that_exclude_each_other(tmp_path: Path) -> None:
    rows = [{"finding": "ABC"[i % 3]} for i in range(90)]
    found = chosen(table(tmp_path, rows, labels=FINDINGS, keep={"per_class": 4}), rows)
    assert sorted(row["finding"] for row in found) == [*"AAAABBBBCCCC"]


def test_k_of_classes_are_the_first_of_one_line_of_all(tmp_path: Path) -> None:
    """All samples stand in one line by lot; each class and "none" takes its first k; nothing else is kept."""
    rows = findings()
    found = {k: keys(table(tmp_path, rows, labels=FINDINGS, keep={"per_class": k})) for k in (1, 2, 5, 10)}
    assert all(set(found[a]) < set(found[b]) for a, b in ((1, 2), (2, 5), (5, 10)))
    for k, some in found.items():
        kept = [rows[int(key[1:])]["finding"] for key in some]
        sets = [set() if text == "No Finding" else set(text.split("|")) for text in kept]
        assert {"todo"}.isdisjoint(kept) and sum(not s for s in sets) == k
        assert all(sum(name in s for s in sets) >= k for name in "ABC")
        # Nobody is there but as one of somebody's k.
        assert len(some) <= 4 * k
    # One class alone gets as many without it.
    alone = {"names": ["A"], "from": "list", "field": "finding", "other": "zeros", "unlabelled": "todo"}
    kept = [r["finding"] for r in chosen(table(tmp_path, rows, labels=alone, keep={"per_class": 7}), rows)]
    assert sum("A" in text for text in kept) == 7 and len(kept) == 14


def test_k_of_columns_with_uncertain_and_bad_values(tmp_path: Path) -> None:
    """Uncertain and bad labels are neither of a class nor free of all."""
    rows = [{"A": a, "B": b} for a, b in [(1, 0), (1, 0), (0, 1), (0, 1), (-1, 0), (0, -1), (7, 1), (0, 0)] * 5]
    found = chosen(table(tmp_path, rows, labels=COLUMNS, keep={"per_class": 10}), rows)
    assert sorted((r["A"], r["B"]) for r in found) == [(0, 0)] * 5 + [(0, 1)] * 10 + [(1, 0)] * 10


def test_k_of_classes_by_patient_takes_patients_whole(tmp_path: Path) -> None:
    rows = findings()
    found = table(tmp_path, rows, labels=FINDINGS, keep={"per_class": 5, "by": "patient"})
    patients = {row["patient"] for row in chosen(found, rows)}
    assert keys(found) == [f"k{i}" for i, row in enumerate(rows) if row["patient"] in patients]
    assert all(sum(name in row["finding"].split("|") for row in chosen(found, rows)) >= 5 for name in "ABC")
    assert len(patients) <= 20


def test_a_share_of_the_patients(tmp_path: Path) -> None:
    rows = findings()
    everybody = {row["patient"] for row in rows}
    shares = {}
    for share in (0.001, 0.1, 0.5, 1):
        found = table(tmp_path, rows, keep={"fraction": share, "by": "patient"})
        shares[share] = {row["patient"] for row in chosen(found, rows)}
        assert keys(found) == [f"k{i}" for i, row in enumerate(rows) if row["patient"] in shares[share]]
        assert len(shares[share]) == max(1, round(share * len(everybody)))
    assert shares[0.001] < shares[0.1] < shares[0.5] < shares[1] == everybody
    assert len(table(tmp_path, rows, keep={"fraction": 0.1})) == 30  # each sample for itself


def test_few_are_the_same_in_any_order_and_others_by_seed(tmp_path: Path) -> None:
    rows = [row | {"key": f"k{i}"} for i, row in enumerate(findings())]
    for keep in ({"fraction": 0.2, "by": "patient"}, {"per_class": 5}, {"per_class": 5, "by": "patient"}):
        one, turned, other = (
            set(keys(table(tmp_path, some, labels=FINDINGS, keep=keep | {"seed": seed})))
            for some, seed in ((rows, 1), (rows[::-1], 1), (rows, 2))
        )
        assert one == turned and len(one & other) < 0.6 * len(one)


def test_few_are_independent_of_a_split_with_the_same_seed(tmp_path: Path) -> None:
    """A tenth of all, and a tenth of the part: were both made of the same hash, the first would all be in one part."""
    rows = [{"patient": f"p{i}"} for i in range(2000)]
    part = set(keys(table(tmp_path, rows, split={"by": "patient", "part": "test", "fraction": 0.5})))
    few = keys(table(tmp_path, rows, keep={"fraction": 0.1, "by": "patient"}))
    assert 70 < sum(key in part for key in few) < 130  # 100, standard deviation 7


def test_few_of_a_list_and_of_a_part(tmp_path: Path) -> None:
    rows = findings()
    (tmp_path / "keep.txt").write_text("\n".join(f"k{i}" for i in range(0, 300, 2)))
    split = {"by": "patient", "part": "train", "fraction": 0.3}
    listed = keys(table(tmp_path, rows, split=split, keep=str(tmp_path / "keep.txt")))
    found = keys(table(tmp_path, rows, split=split, keep={"fraction": 0.5, "list": str(tmp_path / "keep.txt")}))
    assert set(found) < set(listed) and len(found) == round(0.5 * len(listed))


def test_broken_metadata_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = TableSource.fields

    def failing(self: TableSource, i: int) -> dict[str, Any]:
        if self.key(i) == "k5":
            raise BadSample("broken metadata", "no JSON")
        return fields(self, i)

    monkeypatch.setattr(TableSource, "fields", failing)
    found = table(tmp_path, findings(), labels=FINDINGS, keep={"per_class": 3, "by": "patient"})
    assert [(key, reason) for key, reason, _ in found.problems] == [("k5", "broken metadata")] and "k5" not in keys(
        found
    )


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        ({}, "source T is {}: give either per_class or fraction"),
        ({"per_class": 3, "fraction": 0.1}, "give either per_class or fraction"),
        ({"per_clas": 3}, r"unknown keys \['per_clas'\]: use per_class or fraction, by, seed and list"),
        ({"per_class": 0}, "whole numbers"),
        ({"per_class": "all"}, "whole numbers"),
        ({"per_class": 3, "seed": 0.5}, "whole numbers"),
        ({"fraction": 1.5}, "above 0, at most 1"),
        ({"fraction": "a tenth"}, "above 0, at most 1"),
        ({"fraction": 0.5, "by": "case"}, "keep of source T: 300 of 300 samples have no 'case'; the fields are"),
        ({"per_class": 30}, r"per_class=30, but there are fewer samples of C \(\d+\): lower it"),
        ({"per_class": 3, "list": "nowhere.txt"}, "cannot read keep-list nowhere.txt"),
    ],
)
def test_bad_requests_for_a_few_get_one_line(tmp_path: Path, keep: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        table(tmp_path, findings(), labels=FINDINGS, keep=keep)


def test_k_of_classes_needs_labels(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs labels: say how they are made by data\.labels"):
        table(tmp_path, findings(), keep={"per_class": 3})
    with pytest.raises(UserError, match="no label column 'findings'"):
        table(tmp_path, findings(), labels=FINDINGS | {"field": "findings"}, keep={"per_class": 3})
    many = FINDINGS | {"names": [f"n{i}" for i in range(62)], "other": "zeros"}
    with pytest.raises(UserError, match=r"61 classes at most, labels\.names has 62"):
        table(tmp_path, findings(), labels=many, keep={"per_class": 3})
