"""A row for every patch of a slide, good or not, as parquet: `pyarrow.dataset(OUT/index)` is the whole cohort's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from slides.entry import member_name
from slides.files import renamed
from slides.patches import STATUS
from slides.plan import Plan


def write_index(path: Path, plan: Plan, status: np.ndarray, shards: Sequence[str] | None) -> None:
    """Key, slide, level-0 x and y, mpp, coverage, status, and the shard where there are any."""
    n = len(plan)
    columns = {
        "key": [member_name(plan.slide, x, y) for x, y in plan.coords.tolist()],
        "slide": pa.array([plan.slide] * n, pa.string()),
        "x": plan.coords[:, 0],
        "y": plan.coords[:, 1],
        "mpp": np.full(n, plan.geometry.mpp),
        "coverage": plan.coverage,
        "status": pa.array([STATUS[number] for number in status.tolist()], pa.string()),
    }
    if shards is not None:
        columns["shard"] = pa.array(list(shards), pa.string())
    with renamed(path) as part:
        pq.write_table(pa.table(columns), part)
