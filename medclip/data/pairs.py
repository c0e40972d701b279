"""Image-caption pairs as batches that a killed run finds again: the reader, and the loader with a state.

`PairReader` turns a `Ticket` (which samples, which places) into a batch, in whatever process asks: its result depends
on the ticket alone, since every random choice (crop, caption) is drawn from (seed, epoch, place). A model without a
tokenizer gets images alone; labels and statistics come where the sources declare them. `PairLoader` walks
the tickets of all epochs of a run through a torch DataLoader and knows, after each batch, where the run stands. So the
stream is the same for any number of workers, and goes on exactly where it was after a kill.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch.utils.data import DataLoader

from medclip.data.bad import BadSample
from medclip.data.captions import CaptionRule
from medclip.data.crop import RandomCrop
from medclip.data.declared import Declared, Rows
from medclip.data.decode import read_image
from medclip.data.ledger import Bad, Ledger
from medclip.data.order import EpochOrder, Plan, Ticket
from medclip.data.prefetch import Prefetcher
from medclip.data.raw import RawSample, Source
from medclip.data.remember import Remembered
from medclip.data.storage import Storage
from medclip.data.workers import as_is, one_thread
from medclip.types import Batch, Preprocess, Tokenizer


@dataclass
class PairReader:
    """Reads, decodes, augments and tokenises the samples of one ticket.

    Args:
        sources: random-access sources; ids number their samples one after another.
        captions: one rule per source.
        preprocess: the model's image size, resize mode and fill.
        tokenizer: the model's; cuts to its context length. None: batches without text, of which no picture is flat.
        crop: random-resized crop, or None for the model's evaluation transform.
        seed: of crops and caption choices.
        batch_size: rows of every batch; missing ones are padded (see `types.Batch`).
        exact: bit-identical to open_clip's PIL transform instead of the fast path.
        max_pixels: larger images are refused before they are decoded.
        storage: what remote sources read through.
        declared: labels, statistics and the like, one a source; () for none.
        resize: pixels of the shorter side before the centre crop of the evaluation transform; None for the model's own.
        remembered: keeps finished images; without a crop only, which makes another image each time.
    """

    sources: Sequence[Source]
    captions: Sequence[CaptionRule]
    preprocess: Preprocess
    tokenizer: Tokenizer | None
    crop: RandomCrop | None
    seed: int
    batch_size: int
    exact: bool = False
    max_pixels: int = 89_000_000
    storage: Storage | None = None
    declared: Sequence[Declared] = ()
    resize: int | None = None
    remembered: Remembered | None = None
    _starts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self._starts = np.cumsum([0, *(len(source) for source in self.sources)])
        self.declared = list(self.declared) or [Declared()] * len(self.sources)

    def locate(self, sample: int) -> tuple[int, int]:
        """Source number and index within it, for an id."""
        source = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return source, int(sample - self._starts[source])

    def __getitem__(self, ticket: Ticket) -> tuple[Batch, list[Bad]]:
        height, width = self.preprocess.size
        images = _shared((self.batch_size, 3, height, width))
        pixels = images.numpy()
        rows = Rows(self.batch_size, self.declared, self.preprocess)
        keys: list[str] = []
        texts: list[str] = []
        bad: list[Bad] = []
        for sample, place in zip(ticket.ids, ticket.places, strict=True):
            source, index = self.locate(sample)
            rng = np.random.default_rng([self.seed, ticket.epoch, int(place), 2])
            key = self.sources[source].key(index)
            try:
                image, text, label = self._read(source, index, rng)
            except BadSample as error:
                bad.append((key, error.reason, error.detail))
                continue
            pixels[len(keys)] = image.transpose(2, 0, 1)
            rows.set(len(keys), label, self.declared[source])
            keys.append(key)
            texts.append(text)
        batch = Batch(image=images, key=keys, skipped=len(bad), epoch=ticket.epoch, position=ticket.position)
        if self.tokenizer is not None:
            tokens = torch.zeros((self.batch_size, self.tokenizer.context_length), dtype=torch.int64)
            if texts:
                tokens[: len(texts)] = self.tokenizer(texts)
            batch["text"] = tokens
        rows.into(batch)
        if keys:
            # Copies, not blanks: the task drops them, but a batch norm on the way has seen them by then.
            rest = np.arange(len(keys), self.batch_size) % len(keys)
            pixels[len(keys) :] = pixels[rest]
            for name in ("text", "label", "mean", "std"):
                if (values := batch.get(name)) is not None:
                    values[len(keys) :] = values[rest]
        else:
            pixels[:] = 0
        return batch, bad

    def _read(
        self, source: int, index: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, str, Float32[np.ndarray, " c"] | None]:
        rule, declared = self.captions[source], self.declared[source]
        wants_text = self.tokenizer is not None
        want_meta = (wants_text and rule.needs_meta) or declared.labels is not None
        place = int(self._starts[source]) + index
        image = self.remembered.get(place) if self.remembered is not None else None
        if image is None or (wants_text and rule.takes_text):
            raw = self.sources[source].read(index, want_meta=want_meta)
        else:  # the metadata is all that is needed
            raw = RawSample("", b"", None, self.sources[source].fields(index) if want_meta else None)
        # Caption and labels come first: a sample without them is not worth decoding.
        text = rule.pick(raw, rng, self.tokenizer) if wants_text else ""
        label = declared.labels.vector({"key": raw.key} | (raw.meta or {})) if declared.labels is not None else None
        if image is not None:
            return image, text, label
        image = read_image(
            raw.image,
            self.preprocess,
            crop=self.crop,
            rng=rng,
            exact=self.exact,
            max_pixels=self.max_pixels,
            resize=self.resize,
            burned_in=declared.burned_in,
            refuse_flat=not wants_text,
        )
        if self.remembered is not None:
            self.remembered.put(place, image)
        return image, text, label

    def extents(self, sample: int) -> tuple[str, int, int] | None:
        """(url, offset, length) of a sample's bytes where they lie remote."""
        source, index = self.locate(sample)
        return self.sources[source].extents(index)

    def prefetch(self, url: str, offset: int, length: int) -> None:
        if self.storage is not None:
            self.storage.prefetch(url, offset, length)


class PairLoader:
    """Batches of all epochs of a run, one after another, with a state that is one place in that line.

    Lightning sees the run as a single epoch of `len(loader)` batches, of which those before a resume count as done:
    its own bookkeeping then holds whatever number of ranks or batch size the run goes on with.

    Args:
        reader: makes the batches.
        order: of each epoch.
        plan: this rank's share.
        ledger: of bad samples.
        epochs: of the run.
        workers: reader processes; 0 reads in this one.
        prefetch: batches that each worker has ready.
        anew: every iteration begins with the first batch again, as validation wants it.
    """

    def __init__(
        self,
        reader: PairReader,
        order: EpochOrder,
        plan: Plan,
        ledger: Ledger,
        *,
        epochs: int = 1,
        workers: int = 0,
        prefetch: int = 4,
        anew: bool = False,
    ) -> None:
        self.reader = reader
        self.order = order
        self.plan = plan
        self.ledger = ledger
        self.epochs = epochs
        self.workers = workers
        self.prefetch = prefetch
        self.anew = anew
        self.epoch = 0
        self.position = 0
        self.batches = 0

    def __len__(self) -> int:
        """Batches of the whole run: those done before a resume, in whatever size they were, and those to come."""
        if self.anew:
            return self.epochs * self.plan.count(len(self.order))
        if self.epoch >= self.epochs:
            return self.batches
        rest = self.plan.count(len(self.order), self.position)
        return self.batches + rest + (self.epochs - self.epoch - 1) * self.plan.count(len(self.order))

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position, "batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position, self.batches = (int(state[k]) for k in ("epoch", "position", "batches"))

    def __iter__(self) -> Iterator[Batch]:
        if self.anew:
            self.epoch = self.position = self.batches = 0
        prefetcher = Prefetcher(self.reader.extents, self.reader.prefetch)
        loader = DataLoader(
            self.reader,  # pyright: ignore[reportArgumentType]  # anything with __getitem__ serves
            sampler=_Tickets(self.order, self.plan, self.epochs, self.epoch, self.position, prefetcher),  # pyright: ignore
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=self.prefetch if self.workers else None,
            collate_fn=as_is,
            worker_init_fn=one_thread,
            pin_memory=torch.cuda.is_available(),
        )
        try:
            for batch, bad in loader:
                self.ledger.add(bad, seen=len(batch["key"]) + len(bad))
                # The state moves before the batch is handed out: whoever saves does so after training on it.
                self.epoch, self.position = batch["epoch"], batch["position"]
                self.batches += 1
                if self.plan.count(len(self.order), self.position) == 0:
                    self.epoch, self.position = self.epoch + 1, 0
                    if self.epoch == self.epochs:
                        self.ledger.check(final=True)  # here: Lightning takes the last batch and never comes back
                yield batch
        finally:
            prefetcher.close()


_AHEAD = 32  # tickets that the prefetcher sees before the workers do


@dataclass
class _Tickets:
    """Sampler over the tickets of all epochs left; runs in the main process, ahead of the workers."""

    order: EpochOrder
    plan: Plan
    epochs: int
    epoch: int
    position: int
    prefetcher: Prefetcher

    def __iter__(self) -> Iterator[Ticket]:
        ahead: deque[Ticket] = deque()
        for ticket in self._line():
            self.prefetcher.want(ticket.ids)
            ahead.append(ticket)
            if len(ahead) > _AHEAD:
                yield ahead.popleft()
        yield from ahead

    def _line(self) -> Iterator[Ticket]:
        position = self.position
        for epoch in range(self.epoch, self.epochs):
            yield from self.plan.tickets(self.order, epoch, position)
            position = 0


def _shared(shape: tuple[int, ...]) -> torch.Tensor:
    """Uninitialised uint8; within a worker in the memory that it shares, so that handing it over copies nothing."""
    if torch.utils.data.get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's own collate function does
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)
