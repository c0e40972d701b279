"""What a source hands out: the undecoded sample, and the protocol of random-access sources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from medclip.data.captions import CaptionRule


@dataclass(frozen=True, slots=True)
class RawSample:
    """One sample as it is stored; `meta` is None where nobody asked for it."""

    key: str
    image: bytes
    text: str | list[str] | None  # a list where a table has several captions
    meta: dict[str, Any] | None


class Source(Protocol):
    """Samples by number. Every order, resume and share between ranks is arithmetic over `len` and `chunks`.

    Cheap to fork and to pickle: what grows with the number of samples is a numpy array.
    """

    @property
    def name(self) -> str: ...

    @property
    def weight(self) -> float: ...  # passes over this source in one epoch

    @property
    def caption(self) -> CaptionRule: ...

    @property
    def problems(
        self,
    ) -> list[tuple[str, str, str]]: ...  # (key, reason, detail) of samples left out when it was opened

    @property
    def chunks(self) -> np.ndarray: ...  # int64, first is 0: where each run of samples begins that is read together

    def __len__(self) -> int: ...

    def key(self, i: int) -> str: ...

    def read(self, i: int, *, want_meta: bool = False) -> RawSample:
        """Sample i.

        Raises:
            BadSample: it cannot be read.
        """
        ...

    def fields(self, i: int) -> dict[str, Any]:
        """What filters see: the metadata, and `key` and `caption` where it has no such fields; no image is read.

        Raises:
            BadSample: it cannot be read.
        """
        ...

    def extents(self, i: int) -> tuple[str, int, int] | None:
        """(url, offset, length) that reading sample i will touch, or None for local files."""
        ...

    def select(self, rows: np.ndarray) -> Source:
        """The same source with only the samples of a bool mask or of ascending int64 numbers."""
        ...

    def fingerprint(self) -> str:
        """A digest of the files it reads and of the samples selected, under which masks are kept."""
        ...
