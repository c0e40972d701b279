"""Finished images kept in memory: where each is asked about many times, it is read and decoded once.

The memory is one anonymous map that is made before the reader processes are forked, so they all fill it and all look
it up: an image is decoded once in a run, whoever needs it first, and not once by each of them. Pages that nothing was
written to cost nothing. Where processes are not forked each keeps its own.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np

from medclip.data.questions import QuestionSource
from medclip.data.raw import Source

_log = logging.getLogger(__name__)


class Remembered:
    """Images by number, uint8 (height, width, 3).

    Args:
        slots: int64 (samples,): the number of each sample's image; -1 where it is not kept.
        count: of numbers.
        size: (height, width) of every image.
    """

    def __init__(self, slots: np.ndarray, count: int, size: tuple[int, int]) -> None:
        self.slots, self.count, self.size = slots, count, size
        self._map()

    @classmethod
    def of(cls, sources: Sequence[Source], size: tuple[int, int], room: int) -> Remembered | None:
        """For the samples of sources one after another.

        Args:
            sources: whose samples; questions about one image share it.
            size: (height, width) of the finished images.
            room: bytes there may be; images beyond are not kept.

        Returns:
            None where there is no room for a single one.
        """
        names: dict[tuple[int, str], int] = {}
        slots = [
            names.setdefault((number, _image(source, i)), len(names))
            for number, source in enumerate(sources)
            for i in range(len(source))
        ]
        fits = min(len(names), room // (3 * size[0] * size[1]))
        if fits < len(names):
            _log.warning(
                "data.remember: there is room for %d of %d images; %.1f (GB) holds all",
                *(fits, len(names), len(names) * 3 * size[0] * size[1] / 1e9 + 0.05),
            )
        array = np.array(slots, dtype=np.int64)
        return cls(np.where(array < fits, array, -1), fits, size) if fits else None

    @property
    def bytes(self) -> int:
        return self.pixels.nbytes

    def get(self, sample: int) -> np.ndarray | None:
        """The image of a sample, if it is known."""
        slot = int(self.slots[sample])
        return self.pixels[slot] if slot >= 0 and self.known[slot] else None

    def put(self, sample: int, image: np.ndarray) -> None:
        slot = int(self.slots[sample])
        if slot >= 0:
            self.pixels[slot] = image
            self.known[slot] = 1  # last: another process may look at any time, and two that write, write the same

    def _map(self) -> None:
        shape = (self.count, *self.size, 3)
        self.pixels = np.frombuffer(mmap.mmap(-1, int(np.prod(shape))), np.uint8).reshape(shape)
        self.known = np.frombuffer(mmap.mmap(-1, self.count), np.uint8)

    def __getstate__(self) -> dict[str, Any]:
        return {"slots": self.slots, "count": self.count, "size": self.size}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._map()


def _image(source: Source, i: int) -> str:
    return source.about(i)["image"] if isinstance(source, QuestionSource) else str(i)
