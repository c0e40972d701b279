"""Episodes for meta-learning: a few classes at a time, a few samples of each, in a line that a killed run finds again.

Episode e of an epoch is a function of (seed, epoch, e) alone: `ways` classes, and of each `shots + queries` different
samples. A batch is whole episodes one after another, class by class, the shots first. As everywhere a position in the
line is one integer, so that a resume, any number of workers and any number of ranks see the same episodes.

A class is what the labels of a sample say together; with labels of which one is 1 that is the label. Samples whose
labels are not known, or of which none is 1, belong to no class.

    data: {ways: 3, shots: 3, queries: 3, batch_size: 5}   # as MEVF (arXiv:1909.11867) trains: 5 episodes a step
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from medclip.data.bad import BadSample
from medclip.data.declared import Declared
from medclip.data.filters import lookup
from medclip.data.ledger import Bad
from medclip.data.module import PairData
from medclip.data.order import EpochOrder, Plan, Ticket
from medclip.data.pairs import PairReader
from medclip.data.raw import Source
from medclip.data.selection import missing_fields, there_are
from medclip.types import Batch, UserError

_STREAM = 3  # apart from the draws of `order` and `pairs`


@dataclass(frozen=True)
class Shape:
    """Of an episode: classes, and samples of each to adapt to and to be judged by."""

    ways: int
    shots: int
    queries: int

    @property
    def each(self) -> int:
        """Samples of a class."""
        return self.shots + self.queries

    @property
    def rows(self) -> int:
        return self.ways * self.each


class EpisodeOrder(EpochOrder):
    """Ids of the samples of each epoch's episodes.

    Args:
        groups: the ids of each class.
        shape: of an episode.
        episodes: in an epoch.
        seed: of all draws.
        first: only so many samples, of epoch 0's episodes in every epoch; None for all.
    """

    def __init__(
        self, groups: Sequence[np.ndarray], shape: Shape, episodes: int, *, seed: int, first: int | None = None
    ) -> None:
        super().__init__([], seed=seed, first=first)
        self.groups = list(groups)
        self.shape = shape
        self.episodes = episodes

    def __len__(self) -> int:
        whole = self.episodes * self.shape.rows
        return whole if self.first is None else min(whole, self.first)

    def _line(self, epoch: int) -> np.ndarray:
        return np.concatenate([self.episode(epoch, number) for number in range(self.episodes)])

    def episode(self, epoch: int, number: int) -> np.ndarray:
        """int64 (rows,) ids of one episode."""
        rng = np.random.default_rng([self.seed, epoch, number, _STREAM])
        chosen = rng.choice(len(self.groups), self.shape.ways, replace=False)
        drawn = [rng.choice(self.groups[k], self.shape.each, replace=False) for k in chosen]
        return np.concatenate(drawn).astype(np.int64)


@dataclass(frozen=True)
class EpisodePlan(Plan):
    """Ranks take whole batches in turn, where `Plan` deals out samples: an episode stays in one piece."""

    def tickets(self, order: EpochOrder, epoch: int, position: int = 0) -> Iterator[Ticket]:
        ids = order.ids(epoch)
        stride = self.batch_size * self.world
        for _ in range(self.count(len(ids), position)):
            end = min(position + stride, len(ids))
            first = position + self.rank * self.batch_size
            places = np.arange(min(first, end), min(first + self.batch_size, end))
            yield Ticket(epoch, end, ids[places], places)
            position = end


class EpisodeReader:
    """A `PairReader` whose batches have no gaps: in the place of a bad sample comes another one of its class.

    Which one depends on the ticket, and on what is bad, alone. A bad one is counted once by each reader process.

    Args:
        reader: makes the batches.
        groups: the ids of each class.
        each: samples of a class in an episode.
    """

    def __init__(self, reader: PairReader, groups: Sequence[np.ndarray], each: int) -> None:
        self.reader, self.each = reader, each
        self.extents, self.prefetch = reader.extents, reader.prefetch
        self._class = {int(i): k for k, group in enumerate(groups) for i in group}
        self._groups = groups
        self._bad: set[int] = set()

    def __getitem__(self, ticket: Ticket) -> tuple[Batch, list[Bad]]:
        found: list[Bad] = []
        while True:
            whole = self._mended(ticket)
            batch, bad = self.reader[whole]
            if not bad:
                batch["skipped"] = len(found)
                return batch, found
            by_key = {one[0]: one for one in bad}  # several episodes of the batch may have it
            found += by_key.values()
            self._bad |= {int(i) for i in whole.ids if self._key(int(i)) in by_key}

    def _key(self, sample: int) -> str:
        source, index = self.reader.locate(sample)
        return self.reader.sources[source].key(index)

    def _mended(self, ticket: Ticket) -> Ticket:
        ids = ticket.ids.copy()
        taken: set[int] = set()
        for row, sample in enumerate(ids.tolist()):
            if row % self.each == 0:
                taken = set(ids[row : row + self.each].tolist())
            if sample in self._bad:
                group = self._groups[self._class[sample]]
                after = np.roll(group, -int(np.searchsorted(group, sample)) - 1).tolist()
                fit = [other for other in after if other not in taken and other not in self._bad]
                if not fit:
                    raise UserError(
                        f"{self._key(sample)} is bad, and its class has no other sample left for an episode: take "
                        "more data, or fewer data.shots and data.queries"
                    )
                ids[row] = fit[0]
                taken.add(fit[0])
        return replace(ticket, ids=ids)


class EpisodeData(PairData):
    """Episodes of labelled sources.

    Args:
        sources: see `PairData`, as are the other options; `labels` is needed.
        ways: classes of an episode.
        shots: samples of each to adapt to.
        queries: samples of each to be judged by.
        episodes: in an epoch of training.
        val_episodes: of validation.
        batch_size: episodes a step on each rank.
        distinct: field of which an episode's samples have different values (vqa.image); None: any samples.
        **options: of `PairData`.
    """

    def __init__(
        self,
        sources: Sequence[Mapping[str, Any]],
        *,
        ways: int,
        shots: int,
        queries: int,
        episodes: int,
        val_episodes: int = 100,
        batch_size: int = 5,
        distinct: str | None = None,
        **options: Any,
    ) -> None:
        least = {"ways": (ways, 2), "shots": (shots, 1), "queries": (queries, 1), "batch_size": (batch_size, 1)}
        least |= {"episodes": (episodes, 1), "val_episodes": (val_episodes, 1)}
        for name, (value, low) in least.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise UserError(f"data.{name} is {value!r}: give a whole number, {low} or more")
        self.shape = Shape(ways, shots, queries)
        super().__init__(sources, batch_size=batch_size * self.shape.rows, **options)
        if not self.classes:
            raise UserError("data=episodes needs labels: say data.labels={names: […], from: class, field: …}")
        self.episodes, self.val_episodes, self.distinct = episodes, val_episodes, distinct
        self._groups: dict[bool, list[np.ndarray]] = {}

    def mark(self) -> str:
        own = repr((super().mark(), self.shape, self.episodes, self.distinct))
        return hashlib.sha256(own.encode()).hexdigest()[:16]

    def groups(self, *, train: bool) -> list[np.ndarray]:
        """The ids of each class that has enough samples for an episode; reads all metadata once.

        Raises:
            UserError: there are fewer such classes than an episode has.
        """
        if train not in self._groups:
            sources, declared = (self.sources, self.declared) if train else (self.val_sources, self.val_declared)
            if self.distinct is not None:
                for source in sources:
                    check_field(source, self.distinct)
            by_class = classes_of(sources, declared, self.distinct)
            enough = [by_class[key] for key in sorted(by_class) if len(by_class[key]) >= self.shape.each]
            if len(enough) < self.shape.ways:
                raise UserError(
                    f"data.{'sources' if train else 'val_sources'} have {len(enough)} classes of {self.shape.each} "
                    f"samples or more (of {len(by_class)} in all), an episode needs {self.shape.ways}: lower "
                    "data.ways, data.shots or data.queries, or take more data"
                )
            self._groups[train] = enough
        return self._groups[train]

    def _order(self, *, train: bool) -> EpochOrder:
        count = self.episodes if train else self.val_episodes
        first = self._first() if train else None
        return EpisodeOrder(self.groups(train=train), self.shape, count, seed=self.seed, first=first)

    def _plan(self, *, drop_last: bool = False) -> Plan:
        plan = super()._plan(drop_last=drop_last)
        return EpisodePlan(plan.batch_size, plan.rank, plan.world, plan.drop_last)

    def _reader(self, sources: Sequence[Source], declared: Sequence[Declared], *, train: bool) -> Any:
        reader = super()._reader(sources, declared, train=train)
        return EpisodeReader(reader, self.groups(train=train), self.shape.each)


def check_field(source: Source, name: str) -> None:
    """That `data.distinct` names something: with the same empty value in all, a class would have a single sample.

    Raises:
        UserError: none of the source's first samples has such a field.
    """
    if len(source) and missing_fields(source, [name], lambda fields, name: lookup(fields, name) is not None):
        raise UserError(f"data.distinct={name}: source {source.name} has no such field; {there_are(source)}")


def classes_of(
    sources: Sequence[Source], declared: Sequence[Declared], distinct: str | None = None
) -> dict[tuple[float, ...], np.ndarray]:
    """int64 ids, ascending, by the labels of their samples.

    Args:
        sources: whose samples are numbered one after another.
        declared: of each.
        distinct: field of which each class gets one sample a value only.
    """
    found: dict[tuple[float, ...], list[int]] = {}
    seen: set[tuple[Any, ...]] = set()
    start = 0
    for source, one in zip(sources, declared, strict=True):
        for i in range(len(source) if one.labels is not None else 0):
            with suppress(BadSample):  # it is counted where it is read
                fields = source.fields(i)
                assert one.labels is not None
                label = tuple(one.labels.vector(fields).tolist())
                if not (np.isfinite(label).all() and any(label)):
                    continue
                if distinct is not None:
                    value = (label, str(lookup(fields, distinct)))
                    if value in seen:
                        continue
                    seen.add(value)
                found.setdefault(label, []).append(start + i)
        start += len(source)
    return {label: np.array(ids, dtype=np.int64) for label, ids in found.items()}
