"""The manifest: the cohort's order, what is not done yet, and other runs' slides; through awkward words unharmed."""

from __future__ import annotations

import csv
from pathlib import Path

import orjson

from slides.entry import Entry
from slides.manifest import done_rows, write_manifest

ENTRIES = [Entry(name, f"/data/{name}.svs") for name in ("c", "a", 'b, "q" ü', "busy", "died")]


def put(folder: Path, **row: object) -> dict:
    (folder / "state").mkdir(exist_ok=True)
    (folder / "state" / f"{row['slide']}.json").write_bytes(orjson.dumps(row))
    return row


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_come_in_the_cohort_s_order_and_then_others_(tmp_path: Path) -> None:
    put(tmp_path, slide="zzz", status="ok", patches=3)
    put(tmp_path, slide="a", status="failed", reason='it says "no", twice')
    put(tmp_path, slide=ENTRIES[2].slide, status="ok", patches=7, mpp=0.5)
    busy = {"slide": "busy", "status": "busy", "reason": "held"}
    put(tmp_path, slide="died", status="ok", patches=5)
    died = {"slide": "died", "status": "failed", "reason": "died 3 times"}
    rows = write_manifest(tmp_path, ENTRIES, {"busy": busy, "died": died})
    assert [row["slide"] for row in rows] == [entry.slide for entry in ENTRIES]
    assert [row["status"] for row in rows] == ["pending", "failed", "ok", "busy", "failed"]
    found = read(tmp_path)
    assert [row["slide"] for row in found] == [entry.slide for entry in ENTRIES] + ["zzz"]
    assert (
        found[1]["reason"] == 'it says "no", twice' and found[2]["mpp"] == "0.5" and found[0]["path"] == "/data/c.svs"
    )
    assert list(found[0])[:3] == ["slide", "status", "patches"]


def test_half_a_row_and_other_files_are_passed_over(tmp_path: Path) -> None:
    put(tmp_path, slide="a", status="ok")
    (tmp_path / "state/b.json").write_text('{"slide": "b", "sta')
    (tmp_path / "state/c.json").write_text('["slide"]')
    (tmp_path / "state/d.json").mkdir()
    assert list(done_rows(tmp_path / "state")) == ["a"]
    assert done_rows(tmp_path / "gone") == {}


def test_the_user_s_columns_are_kept_out(tmp_path: Path) -> None:
    put(tmp_path, slide="a", status="ok", table={"label": "x"})
    assert "table" not in write_manifest(tmp_path, [ENTRIES[1]])[0] and "table" not in read(tmp_path)[0]
