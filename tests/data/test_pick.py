"""Labels and groups out of metadata, and the first sheet of a workbook."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest

from medclip.data.bad import BadSample
from medclip.data.evalset import EvalSet
from medclip.data.pick import Pick
from medclip.types import Preprocess, UserError

ONE_OF = {"one_of": ["G3", "G4"]}
VALUES = {"field": "dx", "values": {"N": "BT", 1: "BT", "IC": "MT"}}
PATTERN = {"field": "image", "pattern": r"^P(\d+)|slide-(\w+)"}


@pytest.mark.parametrize(
    ("config", "fields", "value"),
    [
        ("a.b", {"a": {"b": 2}}, "2"),
        ("a", {"a": ["only"]}, "only"),
        (ONE_OF, {"G3": 0, "G4": 1}, "G4"),
        (ONE_OF, {"G3": 1.0, "G4": 0.0}, "G3"),
        (VALUES, {"dx": "IC"}, "MT"),
        (VALUES, {"dx": 1}, "BT"),
        (PATTERN, {"image": "P17_3.png"}, "17"),
        (PATTERN, {"image": "a/slide-x9.png"}, "x9"),
        ({"field": "image", "pattern": "P."}, {"image": "xP7y"}, "P7"),
    ],
)
def test_the_value(config: Any, fields: dict[str, Any], value: str) -> None:
    pick = Pick.parse("label", config)
    assert pick is not None and pick(fields) == value


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        ("a", {"a": None}),
        ("a", {"a": ["x", "y"]}),
        (ONE_OF, {"G3": 1, "G4": 1}),
        (ONE_OF, {"G3": 0}),
        (PATTERN, {"image": "nobody.png"}),
        (VALUES, {"dx": "BT"}),
    ],
)
def test_no_value_or_two(config: Any, fields: dict[str, Any]) -> None:
    pick = Pick.parse("group", config)
    assert pick is not None
    with pytest.raises(BadSample, match="missing group"):
        pick(fields)


@pytest.mark.parametrize(
    "config",
    [{"one_of": ["x"]}, {"field": "x"}, {"field": "x", "pattern": "("}, ["x"], {"one_of": ["a", "b"], "field": 1}],
)
def test_other_forms_get_one_line(config: Any) -> None:
    with pytest.raises(UserError, match=r"label(\.pattern)? "):
        Pick.parse("label", config)


def test_a_workbook_with_one_column_a_class(tmp_path: Path) -> None:
    pytest.importorskip("openpyxl")
    for n in range(4):
        cv2.imwrite(str(tmp_path / f"s{n % 2}_{n}.png"), np.full((8, 8), 60 * n, np.uint8))
    rows = [{"image_name": f"s{n % 2}_{n}.png", "G3": int(n == 1), "G4": int(n > 1)} for n in range(4)]
    pd.DataFrame(rows).to_excel(tmp_path / "t.xlsx", index=False)
    source = {"table": str(tmp_path / "t.xlsx"), "columns": {"image": "image_name"}}
    data = EvalSet([source], label=ONE_OF, group={"field": "image_name", "pattern": "^(s.)"})
    [batch] = data.batches(Preprocess(size=(8, 8)))
    assert "meta" in batch
    assert [(meta["label"], meta["group"]) for meta in batch["meta"]] == [("G3", "s1"), ("G4", "s0"), ("G4", "s1")]
    assert [reason for _, reason, _ in data.bad] == ["missing label"]


def test_a_workbook_that_would_unfold_without_end_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "t.xlsx", "w", zipfile.ZIP_DEFLATED) as archive:
        for n in range(5):
            archive.writestr(f"xl/{n}.xml", bytes(60 << 20))
    with pytest.raises(UserError, match="would unfold to 300 MB"):
        EvalSet([{"table": str(tmp_path / "t.xlsx")}])
    (tmp_path / "t.xlsx").write_bytes(b"no zip")
    with pytest.raises(UserError, match="cannot read table"):
        EvalSet([{"table": str(tmp_path / "t.xlsx")}])
