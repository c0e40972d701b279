"""The order of an epoch, as pure arithmetic: which sample comes when, on which rank.

A peer's loader finds its order by running: shard lists, worker splits and shuffle buffers hold state that nobody can
save. Here the order of epoch e is a function of (sources, seed, e) alone, so a position in it is one integer, and
resume, any number of workers and any number of ranks all read from the same line of samples:

1. every source contributes `weight` passes: whole passes, and for a fraction a window that moves on from epoch to
   epoch, so that weight 0.25 has seen everything after four epochs;
2. the chunks (runs of samples that lie together in a shard) of all sources are permuted, which mixes shards that were
   written concept by concept, yet keeps reads near each other;
3. a shuffle buffer of `buffer` samples goes over that line. Its vectorised equal is a jittered sort: sample i is moved
   to rank i + U(0, buffer).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np


@dataclass(frozen=True)
class Part:
    """What the order must know of one source: its length, where its chunks start, and its passes per epoch."""

    size: int
    chunks: np.ndarray  # int64, ascending, first is 0: start of every run of samples that is read together
    weight: float = 1.0

    def drawn(self) -> int:
        """Samples that one epoch draws from this source."""
        return round(self.size * self.weight)


class EpochOrder:
    """Sample ids of each epoch; ids number the samples of all sources one after another.

    Args:
        parts: one per source.
        seed: changes every draw below.
        shuffle: False gives file order (and is then the same in every epoch but for fractional windows).
        buffer: size of the shuffle buffer in samples; at or above the length of the epoch the shuffle is uniform.
        first: only so many samples, those with which epoch 0 begins, in the same order in every epoch; None for all.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        seed: int,
        shuffle: bool = True,
        buffer: int = 16384,
        first: int | None = None,
    ) -> None:
        self.parts = list(parts)
        self.first = first
        self.seed = seed
        self.shuffle = shuffle
        self.buffer = buffer
        self.starts = np.concatenate([[0], np.cumsum([p.size for p in self.parts])]).astype(np.int64)

    def __len__(self) -> int:
        """Samples in one epoch: the same in every epoch, on any number of ranks."""
        whole = sum(part.drawn() for part in self.parts)
        return whole if self.first is None else min(whole, self.first)

    def ids(self, epoch: int) -> np.ndarray:
        """int64 (len(self),) ids in the order of epoch `epoch`."""
        return self._line(epoch) if self.first is None else self._line(0)[: self.first]

    def _line(self, epoch: int) -> np.ndarray:
        ids, units = self._drawn(epoch)
        if not self.shuffle:
            return ids
        rng = np.random.default_rng([self.seed, epoch, 0])
        if self.buffer >= len(ids):
            return ids[rng.permutation(len(ids))]
        priority = rng.permutation(int(units.max()) + 1)
        line = ids[np.argsort(priority[units], kind="stable")]
        return line[np.argsort(np.arange(len(line)) + rng.uniform(0, self.buffer, len(line)), kind="stable")]

    def _drawn(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """All ids of the epoch, and for each the number of the unit (one pass over one chunk) that it belongs to."""
        ids: list[np.ndarray] = []
        units: list[np.ndarray] = []
        unit = 0
        for index, (part, start) in enumerate(zip(self.parts, self.starts[:-1], strict=True)):
            chunk = np.zeros(part.size, dtype=np.int64)
            chunk[part.chunks[part.chunks < part.size]] = 1
            chunk = np.cumsum(chunk) - 1  # chunk number of every sample
            count = int(chunk[-1]) + 1 if part.size else 0
            whole = part.drawn() // part.size if part.size else 0
            for _ in range(whole):
                ids.append(start + np.arange(part.size))
                units.append(unit + chunk)
                unit += count
            if rest := part.drawn() - whole * part.size:
                window = self._window(index, part, chunk, count, rest, epoch)
                ids.append(start + window)
                units.append(unit + chunk[window])
                unit += count
        if not ids:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        return np.concatenate(ids), np.concatenate(units)

    def _window(self, index: int, part: Part, chunk: np.ndarray, count: int, rest: int, epoch: int) -> np.ndarray:
        """The `rest` samples that a fractional pass sees in this epoch: windows of one fixed cyclic line.

        The line's order must not change while the window moves over it, or some samples would come twice before
        others came once; hence no epoch in its seed. File order within the window is kept.
        """
        line = np.arange(part.size)
        if self.shuffle:
            priority = np.random.default_rng([self.seed, index, 1]).permutation(count)
            line = np.argsort(priority[chunk], kind="stable")
        first = (epoch * rest) % part.size
        window = line[np.arange(first, first + rest) % part.size]
        return window if self.shuffle else np.sort(window)


@dataclass(frozen=True)
class Ticket:
    """One rank's batch: which samples, and where the run stands once all ranks have done theirs."""

    epoch: int
    position: int  # samples of the epoch consumed by all ranks after this batch
    ids: np.ndarray  # int64, at most the rank's batch size
    places: np.ndarray  # int64, each sample's place in the epoch's line: unique, and the same on any number of ranks


@dataclass(frozen=True)
class Plan:
    """How ranks share an epoch: global batches of `world * batch_size` samples, dealt out in turn.

    Every rank gets the same number of batches; those of the last global batch differ by at most one sample. A
    position taken under one `world` and `batch_size` holds under any other: the samples before it are done, those
    after it are not.
    """

    batch_size: int
    rank: int = 0
    world: int = 1
    drop_last: bool = False

    def count(self, samples: int, position: int = 0) -> int:
        """Batches that remain on every rank from `position` on, in an epoch of `samples`."""
        batches = Fraction(samples - position, self.batch_size * self.world)
        return max(0, int(batches) if self.drop_last else -int(-batches // 1))

    def tickets(self, order: EpochOrder, epoch: int, position: int = 0) -> Iterator[Ticket]:
        """Yield this rank's `Ticket`s of one epoch from `position` on."""
        ids = order.ids(epoch)
        stride = self.batch_size * self.world
        for _ in range(self.count(len(ids), position)):
            end = min(position + stride, len(ids))
            places = np.arange(position + self.rank, end, self.world)
            yield Ticket(epoch, end, ids[places], places)
            position = end
