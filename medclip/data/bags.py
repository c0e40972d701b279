"""Bags of features for training a slide-level head, and for judging one.

`BagData` has the order, the resume and the ledger of all data here (see `module`): a position in the line of bags is
one integer, and a killed run goes on with the very bag and the very patches that come next. `BagSet` is one part of the
same cohort, in order, with the places of the patches.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
from torch.utils.data import DataLoader

from medclip.data.bag_memory import BagMemory
from medclip.data.bag_reader import BagReader, BalancedOrder
from medclip.data.bag_table import Bag, Cohort, open_cohort
from medclip.data.bag_targets import time_bins
from medclip.data.folds import PARTS, Parts, split_cohort
from medclip.data.ledger import Bad, Ledger
from medclip.data.order import EpochOrder, Part, Plan
from medclip.data.pairs import PairLoader
from medclip.data.workers import as_is, one_thread
from medclip.types import Batch, UserError

_SPLIT = ("folds", "fold", "split_seed", "split")


class BagData(pl.LightningDataModule):
    """Bags for training and validation.

    Args:
        batch_size: bags a step on each rank, padded to the longest of them.
        patches: so many of each bag, others at each step; None: whole bags. Validation always sees whole bags.
        balance: draw classes evenly; an epoch is as long as without.
        epochs: passes over the training part.
        batches: only the first so many global batches of the first epoch, the same in every epoch; None for all.
        workers: reader processes per rank; any number gives the same stream.
        seed: of order and patches; not of the split.
        remember: GB of memory a rank for bags.
        dtype: that they are remembered in, float32 or float16; batches are float32.
        max_bad_fraction: the run stops once more than this share of the table's slides cannot be used.
        output: run folder, for `skipped.jsonl`.
        **cohort: see `bag_table.open_cohort` and `folds.split_cohort`.
    """

    def __init__(
        self,
        *,
        batch_size: int = 1,
        patches: int | None = None,
        balance: bool = False,
        epochs: int = 1,
        batches: int | None = None,
        workers: int = 0,
        seed: int = 0,
        remember: float = 4.0,
        dtype: str = "float32",
        max_bad_fraction: float = 0.05,
        output: str | Path | None = None,
        **cohort: Any,
    ) -> None:
        super().__init__()
        counts = {"batch_size": (batch_size, 1), "epochs": (epochs, 1), "workers": (workers, 0), "seed": (seed, 0)}
        counts |= {} if patches is None else {"patches": (patches, 1)}
        counts |= {} if batches is None else {"batches": (batches, 1)}
        for name, (value, least) in counts.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"data.{name} is {value!r}: give a whole number, {least} or more")
        if not 0 <= max_bad_fraction <= 1:
            raise UserError(f"data.max_bad_fraction is {max_bad_fraction}: give a share from 0 to 1")
        if isinstance(remember, bool) or not isinstance(remember, int | float) or not 0 <= remember < 1e6:
            raise UserError(f"data.remember is {remember!r}: give GB of memory, 0 for none")
        if dtype not in ("float32", "float16"):
            raise UserError(f"data.dtype is {dtype!r}: choose float32 or float16")
        if balance and cohort.get("target") == "survival":
            raise UserError("data.balance draws classes evenly, and target=survival has none: say data.balance=false")
        self.batch_size, self.patches, self.balance, self.epochs, self.batches = (
            *(batch_size, patches, balance),
            *(epochs, batches),
        )
        self.workers, self.seed, self.remember, self.dtype = workers, seed, remember, dtype
        self.max_bad_fraction = max_bad_fraction
        self.output = Path(output) if output is not None else None
        self.split = {key: cohort.pop(key) for key in _SPLIT if key in cohort}
        self.options = cohort
        self.cohort: Cohort | None = None
        self.parts: Parts = {}
        self.edges: tuple[float, ...] | None = None
        self._memory: BagMemory | None = None
        self._loader: PairLoader | None = None
        self._resume: dict[str, Any] | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Their names; of survival, the bins of time."""
        return self._opened().target.names

    def setup(self, stage: str | None = None) -> None:
        if self.cohort is not None:  # Lightning asks once per stage
            return
        self.cohort = open_cohort(**self.options)
        self.parts = split_cohort(self.cohort, **self.split)
        if not len(self.parts["train"]):
            raise UserError("the training part has no bag: mend data.split")
        self.edges = bin_edges(self.cohort, self.parts, self.options)
        if _trainer(self).global_rank == 0:
            for line in report(self.cohort, self.parts):
                print(line, file=sys.stderr)

    def label_counts(self) -> dict[str, tuple[int, int]]:
        """Bags of the training part of each class, and of the others; unknown labels count in neither.

        Of `ordinal` a class is what is said of a bag, not its cumulative label; of `survival` it is a bin of time.
        """
        cohort = self._opened()
        truths = [cohort.bags[i].truth for i in self.parts["train"]]
        kind, names = cohort.target.kind, cohort.target.names
        if kind == "multilabel":
            labels = np.stack([truth.label for truth in truths])
            return {
                name: (int((row == 1).sum()), int((row == 0).sum())) for name, row in zip(names, labels.T, strict=True)
            }
        if kind == "survival":
            places = np.searchsorted(self.edges or (), [truth.time for truth in truths], side="right")
        else:
            places = np.array([names.index(str(truth.shown)) for truth in truths])
        return {name: (int((places == k).sum()), int((places != k).sum())) for k, name in enumerate(names)}

    def train_dataloader(self) -> PairLoader:
        cohort, trainer = self._opened(), _trainer(self)
        ledger = Ledger(self.output / "skipped.jsonl" if self.output else None, max_bad_fraction=self.max_bad_fraction)
        first = trainer.global_rank == 0
        ledger.known(cohort.bad, of=cohort.rows, list_them=first)
        if first and cohort.unlabelled:
            # Not bad: a table may be of some of the slides only.
            unlabelled = [
                (slide, "not in the table", "it has features, and no row of data.table") for slide in cohort.unlabelled
            ]
            ledger.known(unlabelled, of=sys.maxsize)
        self._loader = PairLoader(
            self._reader("train"),  # pyright: ignore[reportArgumentType]  # whatever makes batches of tickets
            self._order(),
            self._plan(),
            ledger,
            epochs=self.epochs,
            workers=self.workers,
            prefetch=2,  # a bag may have a gigabyte
        )
        if self._resume is not None:
            self._check_same_data(self._resume)
            self._loader.load_state_dict(self._resume)
        return self._loader

    def val_dataloader(self) -> list[PairLoader]:
        self._opened()
        if not len(self.parts["val"]):
            return []
        return [
            PairLoader(
                self._reader("val"),  # pyright: ignore[reportArgumentType]
                in_turn(len(self.parts["val"])),
                self._plan(),
                Ledger(None, max_bad_fraction=self.max_bad_fraction),
                workers=self.workers,
                prefetch=2,
                anew=True,
            )
        ]

    def state_dict(self) -> dict[str, Any]:
        if self._loader is None:
            return {}
        return {**self._loader.state_dict(), "seed": self.seed, "samples": len(self._loader.order), "data": self.mark()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resume = state_dict or None

    def mark(self) -> str:
        """A digest of what the order is made of; two runs with equal marks see the same line of bags."""
        own = [(bag.key, bag.patches, bag.truth.stratum) for bag in self._bags("train")]
        text = repr((self.seed, self.patches, self.balance, self.batches, own))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _check_same_data(self, state: Mapping[str, Any]) -> None:
        if state["seed"] != self.seed or state["data"] != self.mark():
            raise UserError(
                f"cannot resume: the checkpoint was trained on {state['samples']} bags (seed {state['seed']}, data "
                f"{state['data']}), now there are {len(self.parts['train'])} (seed {self.seed}, data {self.mark()}): "
                "restore the same data.table, data.features, split and seed, or start a new run"
            )

    def _opened(self) -> Cohort:
        assert self.cohort is not None, "setup comes first"
        return self.cohort

    def _bags(self, part: str) -> list[Bag]:
        return [self._opened().bags[i] for i in self.parts[part]]

    def _order(self) -> EpochOrder:
        first = None if self.batches is None else self.batches * self.batch_size * _trainer(self).world_size
        bags = self._bags("train")
        if self.balance:
            return BalancedOrder(strata_of(bags, self._opened()), seed=self.seed, first=first)
        return EpochOrder([Part(len(bags), np.arange(len(bags)))], seed=self.seed, buffer=len(bags), first=first)

    def _plan(self) -> Plan:
        trainer = _trainer(self)
        return Plan(self.batch_size, trainer.global_rank, trainer.world_size)

    def _reader(self, part: str) -> BagReader:
        if self._memory is None:  # of both parts: what is validated at each epoch is worth keeping as well
            bags = [*self._bags("train"), *self._bags("val")]
            self._memory = BagMemory.of(bags, int(self.remember * 1e9), self.dtype)
        first = 0 if part == "train" else len(self.parts["train"])
        return reader_of(
            self._opened(),
            self._bags(part),
            self._memory,
            np.arange(first, first + len(self.parts[part])),
            batch_size=self.batch_size,
            edges=self.edges,
            patches=self.patches if part == "train" else None,
            seed=self.seed,
        )


class BagSet:
    """Bags of an evaluation, in the table's order.

    Args:
        part: train, val or test of the split; `all` for every bag, whatever the split: a set of its own.
        limit: at most this many bags, drawn evenly over the set, the same every time.
        **cohort: see `bag_table.open_cohort` and `folds.split_cohort`.

    Raises:
        UserError: a bad option, or an empty set.
    """

    def __init__(self, *, part: str = "test", limit: int | None = None, **cohort: Any) -> None:
        if part not in (*PARTS, "all"):
            raise UserError(f"data.part is {part!r}: choose train, val, test or all")
        split = {key: cohort.pop(key) for key in _SPLIT if key in cohort}
        self.cohort = open_cohort(**cohort)
        parts = split_cohort(self.cohort, **split) if part != "all" else {}
        places = parts[part] if part != "all" else np.arange(len(self.cohort.bags))
        if limit is not None and limit < len(places):
            places = np.sort(np.random.default_rng(0).permutation(places)[:limit])
        if not len(places):
            raise UserError(f"the {part} part of the bags is empty: choose another part, or mend the split")
        self.bags = [self.cohort.bags[i] for i in places]
        self.edges = bin_edges(self.cohort, parts, cohort)
        self.part = part
        self.bad: list[Bad] = list(self.cohort.bad)

    @property
    def classes(self) -> tuple[str, ...]:
        """Their names; of survival, the bins of time."""
        return self.cohort.target.names

    @property
    def target(self) -> str:
        """classes, ordinal, multilabel or survival."""
        return self.cohort.target.kind

    @property
    def dim(self) -> int:
        """Width of the features."""
        return self.cohort.dim

    @property
    def encoder(self) -> str | None:
        """That made the features, where the files say it."""
        return self.cohort.encoder

    def __len__(self) -> int:
        """Bags, of which some may turn out unusable."""
        return len(self.bags)

    def batches(self, batch_size: int = 1, workers: int = 0) -> Iterator[Batch]:
        """All bags in order, whole.

        Yields:
            Batches as in training, and with `coords` int64 (b, n, 2), -1 where there are none, and `meta`: a dict a bag
            of slide, patient, group (the patient), label (class, list of classes, or None), raw (the row of the
            table), and what the files say: side (level-0 pixels of a patch), planted (bool (n,) of phantoms), slides.
            `self.bad` lists what was left out once the iteration is over.

        Raises:
            UserError: no bag could be read.
        """
        self.bad = list(self.cohort.bad)
        memory = BagMemory.of(self.bags, 0)
        reader = reader_of(
            self.cohort, self.bags, memory, np.arange(len(self)), batch_size=batch_size, edges=self.edges, whole=True
        )
        tickets = list(Plan(batch_size).tickets(in_turn(len(self)), 0))
        loader = DataLoader(
            reader,  # pyright: ignore[reportArgumentType]
            sampler=tickets,  # pyright: ignore[reportArgumentType]
            batch_size=None,
            num_workers=workers,
            prefetch_factor=2 if workers else None,
            collate_fn=as_is,
            worker_init_fn=one_thread,
        )
        used = 0
        for batch, bad in loader:
            self.bad += bad
            used += len(batch["key"])
            if batch["key"]:
                yield batch
        if not used:
            key, reason, detail = self.bad[-1]
            raise UserError(f"all {len(self)} bags were skipped, e.g. {key} for {reason} ({detail}): mend the features")


def reader_of(cohort: Cohort, bags: list[Bag], memory: BagMemory, numbers: np.ndarray, **options: Any) -> BagReader:
    """A reader of some of a cohort's bags; `options` as in `BagReader`."""
    target = cohort.target
    width = len(target.names) - (target.kind == "ordinal")
    return BagReader(bags, memory, numbers, dim=cohort.dim, labels=width, survival=target.kind == "survival", **options)


def bin_edges(cohort: Cohort, parts: Parts, options: Mapping[str, Any]) -> tuple[float, ...] | None:
    """Inner edges of the bins of time: those given, else by the training part; None where there is neither."""
    if cohort.target.kind != "survival":
        return None
    if cohort.target.edges:
        return cohort.target.edges
    if not len(parts.get("train", ())):
        return None
    bins = (options.get("labels") or {}).get("bins", 4)
    return time_bins([cohort.bags[i].truth for i in parts["train"]], bins)


def strata_of(bags: list[Bag], cohort: Cohort) -> np.ndarray:
    """The class of each bag, by which they are balanced."""
    from medclip.data.bag_targets import with_strata

    return np.array(with_strata([bag.truth for bag in bags], cohort.target))


def in_turn(count: int) -> EpochOrder:
    """The order of the table."""
    return EpochOrder([Part(count, np.arange(count))], seed=0, shuffle=False)


def report(cohort: Cohort, parts: Parts) -> list[str]:
    """What a cohort has come to, in a line or two."""
    patients = len({bag.patient for bag in cohort.bags})
    sizes = ", ".join(f"{name} {len(numbers)}" for name, numbers in parts.items())
    patches = [bag.patches for bag in cohort.bags]
    lines = [
        f"{len(cohort.bags)} bags of {patients} patients ({sizes}), {min(patches)} to {max(patches)} patches of "
        f"{cohort.dim} features ({cohort.encoder or 'encoder not said'})"
    ]
    left_out = [f"{count} × {reason}" for reason, count in Counter(bad[1] for bad in cohort.bad).most_common()]
    left_out += [f"{len(cohort.unlabelled)} × features, but no row in the table"] if cohort.unlabelled else []
    named = {name for numbers in parts.values() for name in numbers.tolist()}
    left_out += [f"{len(cohort.bags) - len(named)} × in no part of the split"] if len(named) < len(cohort.bags) else []
    return lines + ([f"left out: {', '.join(left_out)} (skipped.jsonl)"] if left_out else [])


def _trainer(module: pl.LightningDataModule) -> pl.Trainer:
    assert module.trainer is not None, "the data module is driven by a Trainer"
    return module.trainer
