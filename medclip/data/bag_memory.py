"""Bags kept in memory, read from disk once however many epochs ask for them.

As for images (`remember`) the memory is one anonymous map that is made before the reader processes are forked: they all
fill it and all look it up, and pages that nothing was written to cost nothing. A whole bag in float32 is handed out as
it lies there, without a copy: nobody may write to it.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np

from medclip.data.bad import BadSample
from medclip.data.bag_table import Bag

_log = logging.getLogger(__name__)


class BagMemory:
    """Features by bag.

    Args:
        starts: int64 (bags,): first value of each bag in the memory; -1 where it is not kept.
        size: values in all.
        dtype: float32 or float16.
    """

    def __init__(self, starts: np.ndarray, size: int, dtype: str = "float32") -> None:
        self.starts, self.size, self.dtype = starts, size, dtype
        self._map()

    @classmethod
    def of(cls, bags: Sequence[Bag], room: int, dtype: str = "float32") -> BagMemory:
        """For bags numbered in this order, of which as many of the first are kept as `room` bytes hold."""
        sizes = np.array([bag.patches * bag.dim for bag in bags], dtype=np.int64)
        ends = np.cumsum(sizes)
        fits = ends * np.dtype(dtype).itemsize <= room
        if room and not fits.all():
            _log.warning(
                "data.remember: there is room for %d of %d bags; %.1f (GB) holds all",
                *(int(fits.sum()), len(bags), ends[-1] * np.dtype(dtype).itemsize / 1e9 + 0.05),
            )
        return cls(np.where(fits, ends - sizes, -1), int(sizes[fits].sum()), dtype)

    def read(self, number: int, bag: Bag, rows: np.ndarray | None = None) -> np.ndarray:
        """float32 (n, d) features of bag `number`: of the rows asked for (ascending), or of all; not to be written to.

        Raises:
            BadSample: a file cannot be read, or holds what is no number.
        """
        start = int(self.starts[number])
        if start < 0:
            out = np.empty((bag.patches if rows is None else len(rows), bag.dim), np.float32)
            _load(bag, out, rows)
            return out
        shape = (bag.patches, bag.dim)
        kept = self.values[start : start + shape[0] * shape[1]].reshape(shape)
        if not self.known[number]:
            _load(bag, kept, None)
            self.known[number] = 1  # last: another process may look at any time, and two that write, write the same
        chosen = kept if rows is None else kept[rows]
        return chosen.astype(np.float32, copy=False)

    def _map(self) -> None:
        kind = np.dtype(self.dtype)
        self.values = np.frombuffer(mmap.mmap(-1, max(1, self.size) * kind.itemsize), kind)
        self.known = np.frombuffer(mmap.mmap(-1, max(1, len(self.starts))), np.uint8)

    def __getstate__(self) -> dict[str, Any]:
        return {"starts": self.starts, "size": self.size, "dtype": self.dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._map()


def _load(bag: Bag, out: np.ndarray, rows: np.ndarray | None) -> None:
    """Fill `out` with the rows of all files of a bag, one after another."""
    first = place = 0
    for file in bag.files:
        last = first + file.patches
        own = None if rows is None else rows[(rows >= first) & (rows < last)] - first
        count = file.patches if own is None else len(own)
        part = out[place : place + count]
        if count:
            file.read(part, own)
            with np.errstate(over="ignore", invalid="ignore"):
                # A sum in float32 is quick, and not a number where any value is none.
                if not np.isfinite(part.sum(dtype=np.float32)) and not np.isfinite(part).all():
                    raise BadSample("not finite", f"features of {file.slide} hold NaN, or values too large for them")
        first, place = last, place + count
