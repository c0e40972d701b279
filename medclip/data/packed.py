"""Millions of short strings in two arrays, so that forked workers share them.

A Python list of strings is copied page by page into every worker, because reading an object writes its reference count.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packed:
    """A read-only sequence of strings: one UTF-8 blob, and where each string begins and ends in it."""

    blob: np.ndarray  # uint8
    ends: np.ndarray  # int64 (n + 1,), first is 0

    @classmethod
    def of(cls, strings: Iterable[str | bytes]) -> Packed:
        encoded = [s if isinstance(s, bytes) else s.encode("utf-8", "replace") for s in strings]
        ends = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(s) for s in encoded], out=ends[1:])
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def bytes(self, i: int) -> bytes:
        return self.blob[self.ends[i] : self.ends[i + 1]].tobytes()

    def __getitem__(self, i: int) -> str:
        return self.bytes(i).decode("utf-8", "replace")
