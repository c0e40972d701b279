"""A map as a file to take away."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass

from medclip.app.maps import Map
from medclip.app.viewer import Viewer


@dataclass(frozen=True)
class Download:
    """One kind of file.

    Args:
        make: its content.
        media: HTTP's name of its type.
        ending: of the file's name.
    """

    make: Callable[[Viewer, Map], bytes]
    media: str
    ending: str


def _png(viewer: Viewer, found: Map) -> bytes:
    return found.overlay()


def _csv(viewer: Viewer, found: Map) -> bytes:
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["x", "y", "side", "value"])
    for (x, y), value in zip(found.coords.tolist(), found.values.tolist(), strict=True):
        table.writerow([x, y, f"{found.side:g}", f"{value:.6g}"])
    return out.getvalue().encode()


DOWNLOADS = {
    "png": Download(_png, "image/png", "png"),
    "csv": Download(_csv, "text/csv; charset=utf-8", "csv"),
}
