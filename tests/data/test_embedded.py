"""Parquet files with images in them: unpacked once, each distinct image a file, read as the table they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medclip.data.embedded import unpack
from medclip.data.questions import QuestionSource, vocabulary
from medclip.data.sources import open_sources
from medclip.types import UserError
from tests.conftest import jpeg

PICTURES = [jpeg(np.random.default_rng(i)) for i in range(3)]


def published(folder: Path) -> str:
    """Two files as PathVQA's: an image is repeated for each of its questions, in both files."""
    which = [[0, 0, 1], [1, 2]]
    said = [["Is it red?", "What is it?", "is it there?"], ["where is it?", "Is it wide?"]]
    answers = [["yes", "the liver", "no"], ["in the canals of Hering", "Yes"]]
    for number, images in enumerate(which):
        rows = [{"bytes": PICTURES[i], "path": "../../outside.jpg" if i else None} for i in images]
        table = {"image": rows, "question": said[number], "answer": answers[number]}
        pq.write_table(pa.table(table), folder / f"train-0000{number}-of-00002.parquet")
    return str(folder / "train-*.parquet")


def test_path_vqas_parquet_is_questions_about_distinct_images(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "table": published(tmp_path),
        "name": "p",
        "questions": {"question": "question", "answer": "answer"},
    }
    (source,) = open_sources([config], index=tmp_path / "index")
    assert isinstance(source, QuestionSource) and len(source) == 5 and not source.problems
    assert [source.read(i).image for i in range(5)] == [PICTURES[i] for i in (0, 0, 1, 1, 2)]
    images = [source.about(i)["image"] for i in range(5)]
    assert len(set(images)) == 3 and images[0] == images[1] and images[2] == images[3]
    (folder,) = (tmp_path / "index").glob("*.images")
    assert {path.name for path in folder.iterdir()} == {*images, "rows.jsonl"}
    assert [source.about(i)["slot"] for i in range(5)] == [
        *("closed: yes", "open: liver", "closed: no", "open: in canals of hering", "closed: yes")
    ]
    assert len({source.key(i) for i in range(5)}) == 5
    # Another opening reads what is there.
    stamp = (folder / "rows.jsonl").stat().st_mtime_ns
    names = vocabulary([config], storage={"index": tmp_path / "index"})
    assert names == ["closed: yes", "closed: no", "open: in canals of hering", "open: liver"]
    assert (folder / "rows.jsonl").stat().st_mtime_ns == stamp
    part = {"by": "vqa.image", "fraction": 0.4, "seed": 1}
    halves = [
        open_sources([config | {"split": part | {"part": name}}], index=tmp_path / "index")[0]
        for name in ("train", "test")
    ]
    assert sum(map(len, halves)) == 5
    assert not {*images} - {half.fields(i)["vqa"]["image"] for half in halves for i in range(len(half))}


def test_captions_beside_bytes_are_pairs(tmp_path: Path) -> None:
    pd.DataFrame({"image": [PICTURES[0], b"no image", None], "caption": ["a", "b", "c"], "n": [1, 2, 3]}).to_parquet(
        tmp_path / "t.parquet"
    )
    (source,) = open_sources([{"table": str(tmp_path / "t.parquet")}], index=tmp_path / "index")
    assert [source.read(i, want_meta=True).text for i in range(2)] == ["a", "b"]
    assert source.read(0).image == PICTURES[0] and source.fields(1)["n"] == 2
    assert [reason for _, reason, _ in source.problems] == ["missing image"]


def test_a_parquet_of_paths_stays_a_table(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(PICTURES[0])
    pd.DataFrame({"image": ["a.jpg"], "caption": ["a"]}).to_parquet(tmp_path / "t.parquet")
    assert unpack(str(tmp_path / "t.parquet"), tmp_path / "index") is None
    (source,) = open_sources([{"table": str(tmp_path / "t.parquet")}], index=tmp_path / "index")
    assert source.read(0).image == PICTURES[0] and not (tmp_path / "index").exists()


def test_a_changed_file_is_unpacked_anew_and_a_killed_run_leaves_nothing_half(tmp_path: Path) -> None:
    target = published(tmp_path)
    first = unpack(target, tmp_path / "index")
    pd.DataFrame({"image": [PICTURES[2]], "question": ["q"], "answer": ["a"]}).to_parquet(
        tmp_path / "train-00000-of-00002.parquet"
    )
    second = unpack(target, tmp_path / "index")
    assert first is not None and second is not None and first != second
    assert len(second.read_text().splitlines()) == 3
    broken = tmp_path / "broken.parquet"
    whole = (tmp_path / "train-00001-of-00002.parquet").read_bytes()
    half = whole.find(PICTURES[1][:64])
    broken.write_bytes(whole[:half] + b"\0" * 200 + whole[half + 200 :])
    kept = set((tmp_path / "index").iterdir())
    for content in (broken.read_bytes()[:-50], b"PAR1"):
        broken.write_bytes(content)
        with pytest.raises(UserError, match="cannot read table") as caught:
            unpack(str(broken), tmp_path / "index")
        assert "\n" not in str(caught.value)
    assert set((tmp_path / "index").iterdir()) == kept


def test_no_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read table .*no such file"):
        unpack(str(tmp_path / "gone-*.parquet"), tmp_path)


def test_the_path_of_a_row_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside.jpg"
    outside.write_bytes(b"secret")
    rows = pa.array([{"bytes": None, "path": str(outside)}, {"bytes": PICTURES[0], "path": str(outside)}])
    pq.write_table(pa.table({"image": rows, "caption": ["a", "b"]}), tmp_path / "t.parquet")
    (source,) = open_sources([{"table": str(tmp_path / "t.parquet")}], index=tmp_path / "index")
    assert len(source) == 1 and source.read(0).image == PICTURES[0]
    assert source.problems[0][1] == "missing image"
