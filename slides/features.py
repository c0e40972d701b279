"""Features of a cohort's patches: batches that run across slides, the next slide made ready while this one is read.

The model is the caller's: anything that takes uint8 (b, h, w, 3) and gives (b, d). One thread plans slides ahead, the
reading threads fill a bounded queue, and the caller's thread does nothing but the model, so that its device waits for
neither a slide's opening nor its end. Blocks of features are on disk as soon as they are made: a killed run goes on
inside a slide.

    OUT/20x_256px_0px_overlap/features_ENCODER/ID.h5 (or .zarr)   `features` (n, d) float32, `coords` (n, 2): TRIDENT's
    OUT/features_ENCODER/h5_files/ID.h5                           the same as CLAM has it
    …/features_ENCODER/index.parquet    a row a slide, with what the user's table says of it
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from slides.entry import Entry
from slides.errors import SlideError
from slides.feature_work import FeatureOutput, SlideWork, Told
from slides.files import renamed
from slides.h5 import place
from slides.manifest import done_rows, write_manifest
from slides.progress import Meter
from slides.request import Request, digest
from slides.run import claim


class Encoder(Protocol):
    """A model of patches."""

    @property
    def name(self) -> str: ...  # of the folder that its features go to

    def __call__(self, patches: np.ndarray) -> np.ndarray: ...  # uint8 (b, size, size, 3) -> float (b, d)


@dataclass(frozen=True)
class Report:
    """What a run was like.

    Args:
        rows: of the manifest, one a slide.
        waiting: share of the time that the model waited for patches.
    """

    rows: list[dict[str, Any]]
    waiting: float


def extract_features(
    entries: Sequence[Entry],
    request: Request,
    output: FeatureOutput,
    encoder: Encoder,
    *,
    threads: int = 2,
    meter: Meter | None = None,
    written_one: Told | None = None,
) -> Report:
    """Write the features of every slide that has none yet.

    Args:
        entries: the slides.
        request: which patches; its size is the encoder's input.
        output: where to.
        encoder: the model, called in this thread.
        threads: that read.
        meter: shows progress.
        written_one: told of each slide's plan, file and features.

    Raises:
        SlideError: OUT holds features of other settings.
        OutputError: nothing more can be written.
    """
    folder, mark = claimed(request, output, encoder)
    meter = meter or Meter(len(entries))
    run = _Run(folder, mark, request, output, encoder, threads, meter, written_one)
    try:
        run.go(entries)
    finally:
        meter.say(last=True)
        rows = write_manifest(folder, entries, run.rows)
        write_index(folder, entries, output.format)
    return Report(rows, run.waited / max(run.total, 1e-9))


def claimed(request: Request, output: FeatureOutput, encoder: Encoder) -> tuple[Path, str]:
    """The folder of an encoder's features, marked as this run's, and the fingerprint of its settings.

    An encoder that has a `fingerprint`, text that changes with its weights, is told from others of its name by it.

    Raises:
        SlideError: it holds features of other settings.
        OutputError: it cannot be written.
    """
    folder, mark = marked(request, output, encoder)
    claim(folder, mark)
    return folder, mark


def marked(request: Request, output: FeatureOutput, encoder: Encoder) -> tuple[Path, str]:
    """As `claimed`, which nothing is written for."""
    folder = place(output.path, request, output.layout) / f"features_{encoder.name}"
    model = [encoder.name, getattr(encoder, "fingerprint", "")]
    return folder, digest([request.fingerprint(), output.layout, output.format, output.coords, model])


def features_of_one(
    entry: Entry,
    folder: Path,
    mark: str,
    request: Request,
    output: FeatureOutput,
    encoder: Encoder,
    threads: int,
    written_one: Told | None = None,
) -> dict[str, Any]:
    """The features of one slide into a claimed folder, and its row; whoever calls keeps the manifest."""
    one = _Run(folder, mark, request, output, encoder, threads, Meter(1, every=math.inf), written_one)
    one.go([entry])
    return one.rows[entry.slide]


class _Run:
    """The threads of one run: planning, reading, and the caller's with the model."""

    def __init__(
        self,
        folder: Path,
        mark: str,
        request: Request,
        output: FeatureOutput,
        encoder: Encoder,
        threads: int,
        meter: Meter,
        written_one: Told | None,
    ) -> None:
        self.folder, self.mark, self.request, self.output = folder, mark, request, output
        self.encoder, self.threads, self.meter, self.written_one = encoder, threads, meter, written_one
        self.rows: dict[str, dict[str, Any]] = {}
        self.works: set[SlideWork] = set()  # that hold a file or a lock
        self.waited = self.total = 0.0
        self.stop = threading.Event()

    def go(self, entries: Sequence[Entry]) -> None:
        batches: queue.Queue[Any] = queue.Queue(maxsize=2)
        reading = threading.Thread(target=self._produce, args=(entries, batches), name="reading", daemon=True)
        started = time.perf_counter()
        reading.start()
        try:
            while True:
                before = time.perf_counter()
                item = batches.get()
                self.waited += time.perf_counter() - before
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    return
                self._encode(*item)
        finally:
            self.total = time.perf_counter() - started
            self.stop.set()
            while reading.is_alive():  # it may be waiting for room
                with suppress(queue.Empty):
                    batches.get(timeout=0.05)
            reading.join()
            for work in self.works:
                work.close()

    def _produce(self, entries: Sequence[Entry], batches: queue.Queue[Any]) -> None:
        """Batches; None at the end, an exception for one."""
        try:
            for item in batched(self._patches(entries), self.output.batch_size):
                batches.put(item)
                if self.stop.is_set():
                    return
            batches.put(None)
        except BaseException as error:  # handed to the thread that waits
            batches.put(error)

    def _patches(self, entries: Sequence[Entry]) -> Iterator[tuple[SlideWork, np.ndarray, bool]]:
        """(slide, patches uint8 (n, size, size, 3), whether they are the last); the next slide is planned meanwhile."""
        none = np.zeros((0, self.request.size, self.request.size, 3), np.uint8)
        with ThreadPoolExecutor(1, thread_name_prefix="planning") as planner:
            ahead = planner.submit(self._prepare, entries[0]) if entries else None
            for number in range(len(entries)):
                assert ahead is not None
                work = ahead.result()
                more = number + 1 < len(entries)
                ahead = planner.submit(self._prepare, entries[number + 1]) if more and not self.stop.is_set() else None
                try:
                    for good in work.read(self.request, self.threads):
                        yield work, good, False
                except Exception as error:  # a reader raised what it should not: this slide is over, the run is not
                    work.failed(error)
                yield work, none, True
                if self.stop.is_set():
                    break

    def _prepare(self, entry: Entry) -> SlideWork:
        work = SlideWork(entry, self.folder, self.mark, self.output)
        self.works.add(work)
        work.open(self.request)
        self.meter.patch(len(work), work.done)
        return work

    def _encode(self, batch: np.ndarray, owners: list[tuple[SlideWork, int, bool]]) -> None:
        """Features of a batch, handed to the slides that its patches are of."""
        features = np.zeros((0, 0), np.float32)
        if len(batch):
            features = np.asarray(self.encoder(batch), np.float32)
            if len(features) != len(batch) or features.ndim != 2:
                name = self.encoder.name
                raise SlideError(f"encoder {name} gave {features.shape} for {len(batch)} patches, not (n, d)")
        place = 0
        for work, count, last in owners:
            work.take(features[place : place + count])
            self.meter.patch(0, count)
            place += count
            if last:
                work.finish(self.encoder.name, self.written_one, getattr(self.encoder, "fingerprint", ""))
                self.works.discard(work)
                self.rows[work.entry.slide] = work.row
                self.meter.slide(work.row["status"])


def batched(
    chunks: Iterable[tuple[SlideWork, np.ndarray, bool]], size: int
) -> Iterator[tuple[np.ndarray, list[tuple[SlideWork, int, bool]]]]:
    """Patches in batches of `size`, the last one smaller, and how many of each batch are whose, in order.

    An empty batch only says that a slide has come to its end.
    """
    parts: list[np.ndarray] = []
    owners: list[tuple[SlideWork, int, bool]] = []
    filled = 0
    for work, patches, last in chunks:
        while filled + len(patches) >= size:
            take = size - filled
            yield np.concatenate([*parts, patches[:take]]), [*owners, (work, take, False)]
            parts, owners, filled = [], [], 0
            patches = patches[take:]
        if len(patches):
            parts.append(patches)
            owners.append((work, len(patches), last))
            filled += len(patches)
        elif last and any(one is work for one, _, _ in owners):
            owners.append((work, 0, True))
        elif last:  # nothing of it waits for the batch to fill: it need not either, with its files open
            yield patches, [(work, 0, True)]
    if owners:
        yield np.concatenate(parts), owners


def write_index(folder: Path, entries: Sequence[Entry], ending: str) -> None:
    """Write index.parquet: the slides that any run has written features of, and what the user's table says of them."""
    tables = {entry.slide: {key: str(value) for key, value in entry.extra.items()} for entry in entries}
    rows = [
        tables.get(row["slide"], row.get("table") or {})
        | {k: row.get(k) for k in ("slide", "patches", "dim", "mpp", "path")}
        | {"file": f"{row['slide']}.{ending}"}
        for row in done_rows(folder / "state").values()
        if row.get("status") == "ok"
    ]
    if rows:
        # from_pylist alone takes the columns of the first row.
        columns = dict.fromkeys(name for row in rows for name in row)
        with renamed(folder / "index.parquet") as part:
            pq.write_table(pa.Table.from_pylist([dict.fromkeys(columns) | row for row in rows]), part)
