"""The protocol behind which every slide format lies.

Pixels are uint8 RGB on white: what a scanner did not see, and what lies outside the slide, is (255, 255, 255), never
black. Places are pixels of the level that is read, so that no rounding hides in a call; level-0 coordinates are those
times `downsample`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Level:
    """One resolution of a slide.

    Args:
        width: in pixels.
        height: in pixels.
        downsample: level-0 pixels a pixel, exact: a level whose sides are those of level 0 divided by n and rounded
            has n, not 3.9995.
        tile: (width, height) of the tiles that it is stored in; None where they cannot be read one by one.
    """

    width: int
    height: int
    downsample: float
    tile: tuple[int, int] | None = None


class Slide(Protocol):
    """A slide that is open. Safe to read from several threads at once."""

    @property
    def path(self) -> Path: ...

    @property
    def size(self) -> tuple[int, int]: ...  # (width, height) of level 0

    @property
    def mpp(self) -> float: ...  # micrometres a level-0 pixel

    @property
    def mpp_source(self) -> str: ...  # where that was read, e.g. "aperio.MPP"

    @property
    def levels(self) -> tuple[Level, ...]: ...

    @property
    def properties(self) -> Mapping[str, str]: ...

    @property
    def icc(self) -> bytes | None: ...  # colour profile of the pixels, where the file has one

    def scalable(self, level: int) -> bool:
        """Whether a tile of this level costs less at reduced scale."""
        ...

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """uint8 (height, width, 3) of a rectangle in the level's own pixels; white outside the slide.

        Raises:
            TileError: part of it is broken. Later reads are not affected.
        """
        ...

    def read_tile(self, level: int, column: int, row: int, reduce: int = 1) -> np.ndarray | None:
        """One stored tile, whole as stored (a tile at the border holds padding), decoded at 1/`reduce` scale.

        Args:
            level: one whose `tile` is not None.
            column: of the tile.
            row: of the tile.
            reduce: 1, 2, 4 or 8; divides both sides of the tile.

        Returns:
            uint8 (tile height / reduce, tile width / reduce, 3), or None for a tile that was not scanned (no bytes).

        Raises:
            TileError: it is broken.
        """
        ...

    def tile_jpeg(self, level: int, column: int, row: int) -> bytes | None:
        """A stored tile as a JPEG file of its own, pixels untouched; None where it is not stored as a whole JPEG.

        Raises:
            TileError: it is broken.
        """
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Slide: ...

    def __exit__(self, *exception: object) -> None: ...
