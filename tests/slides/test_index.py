"""The index of patches, read as one data set of a cohort."""

from __future__ import annotations

from pathlib import Path

import pyarrow.dataset as ds
import pyarrow.parquet as pq

from slides.h5 import read_coords
from tests.slides.runs import REQUEST, extract
from tests.slides.toys import break_header, toy_slide


def test_every_patch_of_a_cohort_has_a_row(tmp_path: Path) -> None:
    paths = [toy_slide(tmp_path / f"in/s.{n}.svs", 700, 600, seed=n, downsamples=(1,)).path for n in range(2)]
    break_header(paths[1], column=1, row=1)
    rows = extract(paths, tmp_path / "out", save=("shards", "coords"))
    table = ds.dataset(tmp_path / "out/index").to_table().to_pylist()
    assert len(table) == sum(row["patches"] for row in rows) and len({row["key"] for row in table}) == len(table)
    corrupt = [row for row in table if row["status"] == "corrupt"]
    assert {row["slide"] for row in corrupt} == {"s.1"} and len(corrupt) == rows[1]["corrupt"] > 0
    for slide in ("s.0", "s.1"):
        mine = [row for row in table if row["slide"] == slide]
        coords, _ = read_coords(tmp_path / f"out/20x_64px_0px_overlap/patches/{slide}_patches.h5")
        assert [[row["x"], row["y"]] for row in mine] == coords.tolist()
        assert [row["shard"] for row in mine] == [f"{slide}-{n // 7:05d}.tar" for n in range(len(mine))]
        assert all(row["key"] == f"{slide.replace('.', '-')}_{row['x']}_{row['y']}" for row in mine)
        assert all(row["mpp"] == 0.5 and 0.2 <= row["coverage"] <= 1.0001 for row in mine)


def test_without_shards_there_is_no_column_of_them(tmp_path: Path) -> None:
    path = toy_slide(tmp_path / "a.svs", 600, 500).path
    extract([path], tmp_path / "out", REQUEST, save=("coords",))
    assert "shard" not in pq.read_schema(tmp_path / "out/index/a.parquet").names
