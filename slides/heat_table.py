"""The values of a heat map as a table, for whoever wants to reckon with them."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np

from slides.files import renamed, write_whole


def write_table(
    path: Path, slide: str, values: np.ndarray, coords: np.ndarray, side: float, *, label: str, scale: str = ""
) -> None:
    """slide, x, y, side (level-0 pixels), value; a row a patch, as parquet or CSV by the path's ending.

    Args:
        path: NAME.parquet or NAME.csv.
        slide: its name.
        values: (n,).
        coords: (n, 2).
        side: of a patch.
        label: what the values are; metadata of the parquet.
        scale: of the map's colours, in words; metadata too.

    Raises:
        OutputError: the disk refuses.
    """
    x, y = np.asarray(coords, np.int64).T
    if path.suffix == ".csv":
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(["slide", "x", "y", "side", "value"])
        writer.writerows([slide, a, b, side, float(v)] for a, b, v in zip(x.tolist(), y.tolist(), values, strict=True))
        write_whole(path, text.getvalue().encode())
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "slide": pa.array([slide] * len(values)).dictionary_encode(),
        "x": pa.array(x),
        "y": pa.array(y),
        "side": pa.array(np.full(len(values), side)),
        "value": pa.array(np.asarray(values, np.float64)),
    }
    table = pa.table(columns).replace_schema_metadata({"label": label, "scale": scale})
    with renamed(path) as part:
        pq.write_table(table, part)
