"""Bags as batches: a ticket in, a padded batch out, in whatever process asks; and the order of balanced epochs.

Which patches a step sees is drawn from (seed, epoch, place), so the stream is the same for any number of workers and
ranks, and goes on exactly where it was after a kill (see `pairs`, whose loader drives this reader).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medclip.data.bad import BadSample
from medclip.data.bag_memory import BagMemory
from medclip.data.bag_table import Bag
from medclip.data.bag_targets import bin_label
from medclip.data.ledger import Bad
from medclip.data.order import EpochOrder, Part, Ticket
from medclip.types import Batch

_STREAM = 4  # apart from the draws of `order`, `pairs` and `episodes`


@dataclass
class BagReader:
    """Reads, draws from and pads the bags of one ticket.

    Args:
        bags: numbered from 0.
        memory: of these bags, under `numbers`.
        numbers: int64 (bags,) of each in the memory.
        batch_size: rows of every batch; missing ones are padded (see `types.Batch`).
        dim: width of the features.
        labels: width of `label`.
        edges: of the bins of time, for survival; None without, whose bags then have no `label`.
        survival: batches have `time` and `event`.
        patches: so many of each bag, drawn anew each time; None: whole bags.
        seed: of these draws.
        whole: batches have `coords` and `meta`, too.
    """

    bags: Sequence[Bag]
    memory: BagMemory
    numbers: np.ndarray
    batch_size: int
    dim: int
    labels: int
    edges: Sequence[float] | None = None
    survival: bool = False
    patches: int | None = None
    seed: int = 0
    whole: bool = False

    def __getitem__(self, ticket: Ticket) -> tuple[Batch, list[Bad]]:
        read: list[tuple[Bag, np.ndarray, dict[str, Any]]] = []
        bad: list[Bad] = []
        for sample, place in zip(ticket.ids.tolist(), ticket.places.tolist(), strict=True):
            bag = self.bags[sample]
            try:
                rows = self._rows(bag, ticket.epoch, place)
                values = self.memory.read(int(self.numbers[sample]), bag, rows)
                read.append((bag, values, _about(bag) if self.whole else {}))
            except BadSample as error:
                bad.append((bag.key, error.reason, error.detail))
        batch = Batch(key=[bag.key for bag, _, _ in read], skipped=len(bad), epoch=ticket.epoch)
        batch["position"] = ticket.position
        values, real = self._padded([values for _, values, _ in read])
        batch["bag"], batch["real"] = values, real
        self._truths([bag for bag, _, _ in read], batch)
        if self.whole:
            coords = torch.full((*real.shape, 2), -1, dtype=torch.int64)
            batch["meta"] = []
            for row, (bag, own, about) in enumerate(read):
                if "coords" in about:
                    coords[row, : len(own)] = torch.from_numpy(about.pop("coords"))
                meta = {"slide": bag.key, "patient": bag.patient, "label": bag.truth.shown, "group": bag.patient}
                batch["meta"].append(meta | about | {"raw": dict(bag.row)})
            batch["coords"] = coords
        return batch, bad

    def _rows(self, bag: Bag, epoch: int, place: int) -> np.ndarray | None:
        """Patches of a step, ascending; None for all."""
        if self.patches is None or bag.patches <= self.patches:
            return None
        rng = np.random.default_rng([self.seed, epoch, place, _STREAM])
        return np.sort(rng.choice(bag.patches, self.patches, replace=False))

    def _padded(self, bags: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """`bag` and `real`. A row without a bag has a single patch, which is another's: nothing is made of nothing."""
        if len(bags) == self.batch_size == 1:
            return torch.from_numpy(bags[0])[None], torch.ones((1, len(bags[0])), dtype=torch.bool)
        longest = max((len(values) for values in bags), default=1)
        bag = torch.zeros((self.batch_size, longest, self.dim))
        real = torch.zeros((self.batch_size, longest), dtype=torch.bool)
        for row, values in enumerate(bags):
            bag[row, : len(values)] = torch.from_numpy(values)
            real[row, : len(values)] = True
        real[len(bags) :, 0] = True
        if bags:
            bag[len(bags) :, 0] = bag[0, 0]
        return bag, real

    def _truths(self, bags: Sequence[Bag], batch: Batch) -> None:
        """`label`, `time` and `event`; rows without a bag repeat those that have one."""
        turn = np.arange(self.batch_size) % max(1, len(bags))

        def rows(values: list[Any], width: tuple[int, ...]) -> Tensor:
            array = (
                np.array(values, dtype=np.float32).reshape(-1, *width) if values else np.zeros((1, *width), np.float32)
            )
            return torch.from_numpy(array[turn])

        if self.survival:
            batch["time"] = rows([bag.truth.time for bag in bags], ())
            batch["event"] = rows([bag.truth.event for bag in bags], ())
            if self.edges is not None:
                labels = [bin_label(bag.truth.time, self.edges) for bag in bags]
                batch["label"] = rows(labels, (len(self.edges) + 1,))
        else:
            batch["label"] = rows([bag.truth.label for bag in bags], (self.labels,))

    def extents(self, sample: int) -> None:
        """Bags are local: nothing is fetched ahead."""

    def prefetch(self, url: str, offset: int, length: int) -> None:
        """Nothing, as above."""


def _about(bag: Bag) -> dict[str, Any]:
    """What all files of a bag say of their patches; of several also `slides`, [(name, patches)]."""
    parts = [file.about() for file in bag.files]
    found: dict[str, Any] = {}
    for name in ("coords", "planted"):
        if all(name in part for part in parts):
            found[name] = np.concatenate([part[name] for part in parts])
    if len({part.get("side") for part in parts}) == 1 and "side" in parts[0]:
        found["side"] = parts[0]["side"]
    if len(parts) > 1:
        found["slides"] = [(file.slide, file.patches) for file in bag.files]
    return found


class BalancedOrder(EpochOrder):
    """An epoch as long as the data, in which each class has the same share, of its bags each as often as can be.

    Args:
        strata: int64 (bags,) class of each.
        seed: of all draws.
        first: only so many, those of epoch 0, in every epoch; None for all.
    """

    def __init__(self, strata: np.ndarray, *, seed: int, first: int | None = None) -> None:
        super().__init__([Part(len(strata), np.arange(len(strata)))], seed=seed, first=first)
        self.groups = [np.flatnonzero(strata == value) for value in np.unique(strata)]

    def _line(self, epoch: int) -> np.ndarray:
        n, c = self.parts[0].size, len(self.groups)
        rng = np.random.default_rng([self.seed, epoch, _STREAM])
        drawn = []
        for k, group in enumerate(self.groups):
            count = n // c + ((k - epoch) % c < n % c)  # the odd ones go round from epoch to epoch
            passes, rest = divmod(count, len(group))
            drawn += [np.tile(group, passes), rng.permutation(group)[:rest]]
        return rng.permutation(np.concatenate(drawn)).astype(np.int64)
