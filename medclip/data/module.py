"""The one LightningDataModule: opens the sources of a config and hands out resumable loaders.

It asks the model what it eats (`task.model.preprocess`, `task.model.tokenizer`), so that the pixels and tokens of a
run always fit its weights, and it carries the state of the stream in every checkpoint. A model whose tokenizer is None
gets images, and labels where `labels` says how they are made.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl

from medclip.data.augment import augmented
from medclip.data.bad import BadSample
from medclip.data.crop import RandomCrop
from medclip.data.declared import Declared, classes, declarations
from medclip.data.folders import FolderSource
from medclip.data.index import default_folder
from medclip.data.ledger import Ledger
from medclip.data.order import EpochOrder, Part, Plan
from medclip.data.pairs import PairLoader, PairReader
from medclip.data.questions import report
from medclip.data.raw import Source
from medclip.data.remember import Remembered
from medclip.data.selection import check_apart, group_hashes
from medclip.data.sources import open_sources, open_storage
from medclip.data.tables import TableSource
from medclip.types import UserError

_log = logging.getLogger(__name__)


class PairData(pl.LightningDataModule):
    """Streamed image-caption pairs for training, and a second list of sources for validation.

    Args:
        sources: list of `{urls | table | folder, weight, caption, filter, keep, split, …}` (see `data/sources.py`).
        val_sources: the same for validation; empty for none.
        batch_size: samples per step on each rank.
        epochs: passes over the sources (a source's `weight` scales its share of a pass).
        workers: reader processes per rank; any number gives the same stream.
        seed: of order, crops and caption choices.
        shuffle_buffer: samples of the shuffle buffer that goes over the permuted chunks.
        crop: random-resized crop of training images.
        flip: probability of a mirrored training image, after the crop.
        randaug: timm's RandAugment after that, e.g. "rand-m6-mstd0.5-inc1"; None for none.
        eval_resize: pixels of the shorter side before the centre crop of validation images; None for the model's own
            transform.
        labels: how labels are made, see `labels`; a source's own `labels` come over it.
        group: field of what may not be both in `sources` and in `val_sources` (the patient); None: not checked.
        decode: "fast", or "exact" for the pixels of open_clip's PIL transform.
        max_pixels: larger images are refused before they are decoded.
        max_bad_fraction: the run stops once more than this share of samples is bad.
        drop_last: leave out the last, smaller global batch of an epoch.
        batches: only the first so many global batches of the first epoch, the same in every epoch; None for all.
        remember: GB of memory a rank for finished images, where each is asked about many times; without a crop.
        storage: `index`, `cache` and retry settings of remote sources (see `sources.open_storage`).
        output: run folder, for `skipped.jsonl`.
    """

    def __init__(
        self,
        sources: Sequence[Mapping[str, Any]],
        *,
        val_sources: Sequence[Mapping[str, Any]] = (),
        batch_size: int = 64,
        epochs: int = 1,
        workers: int = 2,
        seed: int = 0,
        shuffle_buffer: int = 16384,
        crop: RandomCrop | None = None,
        flip: float = 0.0,
        randaug: str | None = None,
        eval_resize: int | None = None,
        labels: Mapping[str, Any] | None = None,
        group: str | None = None,
        decode: str = "fast",
        max_pixels: int = 89_000_000,
        max_bad_fraction: float = 0.05,
        drop_last: bool = False,
        batches: int | None = None,
        remember: float = 0.0,
        storage: Mapping[str, Any] | None = None,
        output: str | Path | None = None,
    ) -> None:
        super().__init__()
        if not sources:
            raise UserError(
                "data.sources is empty: name at least one, e.g. data=shards 'data.sources.0.urls=shards/*.tar'"
            )
        if decode not in ("fast", "exact"):
            raise UserError(f"data.decode is {decode!r}: choose fast or exact")
        counts = {"batch_size": (batch_size, 1), "epochs": (epochs, 1), "workers": (workers, 0)}
        counts |= {} if batches is None else {"batches": (batches, 1)}
        counts |= {"shuffle_buffer": (shuffle_buffer, 1), "max_pixels": (max_pixels, 1), "seed": (seed, 0)}
        for name, (value, least) in counts.items():
            if not isinstance(value, int) or value < least:
                raise UserError(f"data.{name} is {value!r}: give a whole number, {least} or more")
        if not 0 <= max_bad_fraction <= 1:
            raise UserError(f"data.max_bad_fraction is {max_bad_fraction}: give a share from 0 to 1")
        if isinstance(remember, bool) or not isinstance(remember, int | float) or not 0 <= remember < 1e6:
            raise UserError(f"data.remember is {remember!r}: give GB of memory, 0 for none")
        if remember and (crop is not None or flip or randaug is not None):
            raise UserError(
                "data.remember keeps finished images, but data.crop, flip and randaug make another one each time: "
                "leave these out (data.crop=null), or set data.remember=0"
            )
        self.configs = [dict(source) for source in sources]
        self.val_configs = [dict(source) for source in val_sources]
        declared = declarations([*self.configs, *self.val_configs], labels, group)
        self.declared, self.val_declared = declared[: len(sources)], declared[len(sources) :]
        self.classes = classes(declared)
        self.batch_size = batch_size
        self.epochs = epochs
        self.workers = workers
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.crop = crop
        self.flip = flip
        self.randaug = randaug
        self.eval_resize = eval_resize
        self.exact = decode == "exact"
        self.max_pixels = max_pixels
        self.max_bad_fraction = max_bad_fraction
        self.drop_last = drop_last
        self.batches = batches
        self.remember = remember
        self.storage_options = dict(storage or {})
        self.output = Path(output) if output is not None else None
        self.sources: list[Source] = []
        self.val_sources: list[Source] = []
        self._opened: list[int] = []  # samples of each source before anything was selected
        self._remembered: dict[bool, Remembered | None] = {}  # of training and of validation
        self._loader: PairLoader | None = None
        self._resume: dict[str, Any] | None = None

    def setup(self, stage: str | None = None) -> None:
        if self.sources:  # Lightning asks once per stage
            return
        options = dict(self.storage_options)
        index = options.pop("index", None)
        self.storage = open_storage(**options)
        self._opened = []
        if _model(self).tokenizer is None:  # no sample is bad for want of a caption
            for config in (*self.configs, *self.val_configs):
                config["caption"] = False
        rules, val_rules = ([one.labels for one in part] for part in (self.declared, self.val_declared))
        self.sources = open_sources(self.configs, index=index, storage=self.storage, opened=self._count, rules=rules)
        self.val_sources = open_sources(self.val_configs, index=index, storage=self.storage, rules=val_rules)
        both = list(zip([*self.sources, *self.val_sources], [*self.declared, *self.val_declared], strict=True))
        for source, declared in both:
            if declared.labels is not None:
                declared.labels.check(source)
        by = [declared.group for _, declared in both]
        if self.val_sources and any(by):
            folder = Path(index).expanduser() if index is not None else default_folder()
            hashes = [
                group_hashes(source, declared.group, folder) if declared.group else np.empty(0, np.int64)
                for source, declared in both
            ]
            check_apart(hashes[: len(self.sources)], hashes[len(self.sources) :], next(filter(None, by)))
        if _trainer(self).global_rank == 0:
            answers = any(one.labels and one.labels.listing.startswith("vqa.") for one in self.declared)
            report(self.sources, self.val_sources, self.classes if answers else ())

    def _tell_of_empty_classes(self) -> None:
        """Warn of classes about which nothing can be learned; where all metadata is at hand, for it is all read."""
        if self.classes and all(isinstance(source, TableSource | FolderSource) for source in self.sources):
            empty = [name for name, counts in self.label_counts().items() if not all(counts)]
            if empty:
                _log.warning(
                    "data.sources have no sample with, or none without, %s: nothing can be learned of %s; leave %s out "
                    "of labels.names, or take more data",
                    *(", ".join(empty), *(["it"] if len(empty) == 1 else ["them"]) * 2),
                )

    def label_counts(self) -> dict[str, tuple[int, int]]:
        """Samples of `sources` in which each class is present and absent; bad ones and unknown labels count in neither.

        Reads the metadata of every sample.
        """
        counts = np.zeros((2, len(self.classes)), dtype=np.int64)
        for source, declared in zip(self.sources, self.declared, strict=True):
            if declared.labels is not None:
                for i in range(len(source)):
                    with suppress(BadSample):
                        label = declared.labels.vector(source.fields(i))
                        counts += label == 1, label == 0
        return {name: (int(present), int(absent)) for name, present, absent in zip(self.classes, *counts, strict=True)}

    def _count(self, source: Source) -> None:
        self._opened.append(len(source) + len(source.problems))

    def train_dataloader(self) -> PairLoader:
        trainer = _trainer(self)
        if trainer.global_rank == 0:
            self._tell_of_empty_classes()
        path = self.output / "skipped.jsonl" if self.output else None
        ledger = Ledger(path, max_bad_fraction=self.max_bad_fraction)
        for source, total in zip(self.sources, self._opened, strict=True):
            ledger.known(source.problems, of=total, list_them=trainer.global_rank == 0)
        order = self._order(train=True)
        self._loader = PairLoader(
            self._reader(self.sources, self.declared, train=True),
            order,
            self._plan(drop_last=self.drop_last),
            ledger,
            epochs=self.epochs,
            workers=self.workers,
        )
        if not len(self._loader):
            raise UserError(
                f"data.sources make no batch: an epoch draws {len(order)} samples (data.batch_size={self.batch_size}, "
                f"{trainer.world_size} ranks, data.drop_last={self.drop_last}): raise a weight, or lower the batch"
            )
        if self._resume is not None:
            self._check_same_data(self._resume)
            self._loader.load_state_dict(self._resume)
        return self._loader

    def val_dataloader(self) -> list[PairLoader]:
        if not self.val_sources:
            return []
        ledger = Ledger(None, max_bad_fraction=self.max_bad_fraction)
        return [
            PairLoader(
                self._reader(self.val_sources, self.val_declared, train=False),
                self._order(train=False),
                self._plan(),
                ledger,
                workers=self.workers,
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
        """A digest of what the order is made of; two runs with equal marks see the same line of samples."""
        digest = hashlib.sha256(repr((self.seed, self.shuffle_buffer)).encode())
        for source in self.sources:
            # Every key of millions would take minutes; a few that are spread over all tell selections apart.
            some = (
                [source.key(i) for i in np.unique(np.linspace(0, len(source) - 1, 64).astype(int))]
                if len(source)
                else []
            )
            digest.update(repr((len(source), source.weight, some, source.chunks.tobytes()[:65536])).encode())
        return digest.hexdigest()[:16]

    def _check_same_data(self, state: Mapping[str, Any]) -> None:
        if state["seed"] != self.seed or state["data"] != self.mark():
            raise UserError(
                f"cannot resume: the checkpoint was trained on {state['samples']} samples (seed {state['seed']}, data "
                f"{state['data']}), now there are {sum(len(s) for s in self.sources)} (seed {self.seed}, data "
                f"{self.mark()}): restore the same data.sources and seed, or start a new run from the checkpoint with "
                "model.pretrained="
            )

    def _order(self, *, train: bool) -> EpochOrder:
        if not train:
            return EpochOrder([Part(len(s), s.chunks, 1.0) for s in self.val_sources], seed=self.seed, shuffle=False)
        parts = [Part(len(source), source.chunks, source.weight) for source in self.sources]
        return EpochOrder(parts, seed=self.seed, buffer=self.shuffle_buffer, first=self._first())

    def _first(self) -> int | None:
        """Samples that `batches` makes."""
        return None if self.batches is None else self.batches * self.batch_size * _trainer(self).world_size

    def _plan(self, *, drop_last: bool = False) -> Plan:
        trainer = _trainer(self)
        return Plan(self.batch_size, trainer.global_rank, trainer.world_size, drop_last)

    def _reader(self, sources: Sequence[Source], declared: Sequence[Declared], *, train: bool) -> PairReader:
        model = _model(self)
        crop = augmented(self.crop, self.flip, self.randaug, model.preprocess) if train else None
        if self.eval_resize is not None and self.eval_resize < max(model.preprocess.size):
            raise UserError(
                f"data.eval_resize is {self.eval_resize}, less than the model's {max(model.preprocess.size)} pixels: "
                "raise it, or set null for the model's own transform"
            )
        if self.remember and train not in self._remembered:
            room = int(self.remember * 1e9) - sum(other.bytes for other in self._remembered.values() if other)
            self._remembered[train] = Remembered.of(sources, model.preprocess.size, room)
        return PairReader(
            sources=sources,
            captions=[source.caption for source in sources],
            preprocess=model.preprocess,
            tokenizer=model.tokenizer,
            crop=crop,
            seed=self.seed,
            batch_size=self.batch_size,
            exact=self.exact,
            max_pixels=self.max_pixels,
            storage=self.storage,
            declared=declared,
            resize=self.eval_resize,
            remembered=self._remembered.get(train),
        )


def _model(module: pl.LightningDataModule) -> Any:
    return _trainer(module).lightning_module.model


def _trainer(module: pl.LightningDataModule) -> pl.Trainer:
    assert module.trainer is not None, "the data module is driven by a Trainer"
    return module.trainer
