"""A row for every patch of a slide, good or not, as parquet: `pyarrow.dataset(OUT/index)` is the whole cohort's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from slides.entry import member_name
from slides.files import renamed
from slides.patches import STATUS
from slides.plan import Plan


def write_index(path: Path, plan: Plan, status: np.ndarray, shards: Sequence[str] | None) -> None:
    """Key, slide, level-0 x and y, mpp, coverage, status, and the shard where there are any."""
    import pyarrow as pa  # at the end of a slide, when its pixels are gone: the peak of memory stays lower
    import pyarrow.parquet as pq

    n = len(plan)

    def numbers(values: np.ndarray, kind: pa.DataType) -> pa.Array:
        # From buffers: `pa.array` would import pandas to see what it is given, 40 MB.
        return pa.Array.from_buffers(kind, n, [None, pa.py_buffer(np.ascontiguousarray(values).tobytes())])

    def texts(values: Sequence[str]) -> pa.Array:
        raw = [value.encode() for value in values]
        ends = np.cumsum([0, *map(len, raw)]).astype(np.int32)
        return pa.Array.from_buffers(pa.string(), n, [None, pa.py_buffer(ends.tobytes()), pa.py_buffer(b"".join(raw))])

    columns = {
        "key": texts([member_name(plan.slide, x, y) for x, y in plan.coords.tolist()]),
        "slide": texts([plan.slide] * n),
        "x": numbers(plan.coords[:, 0], pa.int64()),
        "y": numbers(plan.coords[:, 1], pa.int64()),
        "mpp": numbers(np.full(n, plan.geometry.mpp), pa.float64()),
        "coverage": numbers(plan.coverage.astype(np.float32), pa.float32()),
        "status": texts([STATUS[number] for number in status.tolist()]),
    }
    if shards is not None:
        columns["shard"] = texts(shards)
    with renamed(path) as part:
        pq.write_table(pa.Table.from_arrays(list(columns.values()), names=list(columns)), part)
