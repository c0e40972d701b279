"""The one LightningDataModule: opens the sources of a config and hands out resumable loaders.

It asks the model what it eats (`task.model.preprocess`, `task.model.tokenizer`), so that the pixels and tokens of a
run always fit its weights, and it carries the state of the stream in every checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl

from medclip.data.crop import RandomCrop
from medclip.data.ledger import Ledger
from medclip.data.order import EpochOrder, Part, Plan
from medclip.data.pairs import PairLoader, PairReader
from medclip.data.raw import Source
from medclip.data.sources import open_sources, open_storage
from medclip.types import UserError


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
        decode: "fast", or "exact" for the pixels of open_clip's PIL transform.
        max_pixels: larger images are refused before they are decoded.
        max_bad_fraction: the run stops once more than this share of samples is bad.
        drop_last: leave out the last, smaller global batch of an epoch.
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
        decode: str = "fast",
        max_pixels: int = 89_000_000,
        max_bad_fraction: float = 0.05,
        drop_last: bool = False,
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
        counts |= {"shuffle_buffer": (shuffle_buffer, 1), "max_pixels": (max_pixels, 1), "seed": (seed, 0)}
        for name, (value, least) in counts.items():
            if not isinstance(value, int) or value < least:
                raise UserError(f"data.{name} is {value!r}: give a whole number, {least} or more")
        if not 0 <= max_bad_fraction <= 1:
            raise UserError(f"data.max_bad_fraction is {max_bad_fraction}: give a share from 0 to 1")
        self.configs = [dict(source) for source in sources]
        self.val_configs = [dict(source) for source in val_sources]
        self.batch_size = batch_size
        self.epochs = epochs
        self.workers = workers
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.crop = crop
        self.exact = decode == "exact"
        self.max_pixels = max_pixels
        self.max_bad_fraction = max_bad_fraction
        self.drop_last = drop_last
        self.storage_options = dict(storage or {})
        self.output = Path(output) if output is not None else None
        self.sources: list[Source] = []
        self.val_sources: list[Source] = []
        self._opened: list[int] = []  # samples of each source before anything was selected
        self._loader: PairLoader | None = None
        self._resume: dict[str, Any] | None = None

    def setup(self, stage: str | None = None) -> None:
        if self.sources:  # Lightning asks once per stage
            return
        options = dict(self.storage_options)
        index = options.pop("index", None)
        self.storage = open_storage(**options)
        self._opened = []
        self.sources = open_sources(self.configs, index=index, storage=self.storage, opened=self._count)
        self.val_sources = open_sources(self.val_configs, index=index, storage=self.storage)

    def _count(self, source: Source) -> None:
        self._opened.append(len(source) + len(source.problems))

    def train_dataloader(self) -> PairLoader:
        trainer = _trainer(self)
        path = self.output / "skipped.jsonl" if self.output else None
        ledger = Ledger(path, max_bad_fraction=self.max_bad_fraction)
        for source, total in zip(self.sources, self._opened, strict=True):
            ledger.known(source.problems, of=total, list_them=trainer.global_rank == 0)
        order = EpochOrder(
            [Part(len(source), source.chunks, source.weight) for source in self.sources],
            seed=self.seed,
            buffer=self.shuffle_buffer,
        )
        self._loader = PairLoader(
            self._reader(self.sources, crop=self.crop),
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
        order = EpochOrder([Part(len(s), s.chunks, 1.0) for s in self.val_sources], seed=self.seed, shuffle=False)
        ledger = Ledger(None, max_bad_fraction=self.max_bad_fraction)
        return [
            PairLoader(
                self._reader(self.val_sources, crop=None),
                order,
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

    def _plan(self, *, drop_last: bool = False) -> Plan:
        trainer = _trainer(self)
        return Plan(self.batch_size, trainer.global_rank, trainer.world_size, drop_last)

    def _reader(self, sources: Sequence[Source], *, crop: RandomCrop | None) -> PairReader:
        model: Any = _trainer(self).lightning_module.model
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
        )


def _trainer(module: pl.LightningDataModule) -> pl.Trainer:
    assert module.trainer is not None, "the data module is driven by a Trainer"
    return module.trainer
