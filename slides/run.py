"""A cohort: every slide by threads and processes of this machine, or by Ray on many.

`run(entries, work, folder)` calls `work(entry, progress)` for each slide and keeps the manifest. A slide that fails is
a row; a process that dies (killed, out of memory) is started again, and its slide goes on where it was.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
import time
import types
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import orjson

from slides.entry import Entry
from slides.errors import SlideError
from slides.files import sweep_old, write_whole
from slides.manifest import write_manifest
from slides.progress import Meter

Row = dict[str, Any]
Progress = Callable[[int, int], None]
Work = Callable[[Entry, Progress], Row]
_TRIES = 3
_MANIFEST_EVERY = 2.0  # seconds


def cores() -> int:
    """CPUs that this process may use, as SLURM and containers set them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def split_cores(slides: int, processes: int | None = None, threads: int | None = None) -> tuple[int, int]:
    """(processes, threads of each): a process a slide as far as there are cores, then threads in it."""
    most = cores()
    processes = processes or max(1, min(most, slides))
    return processes, threads or max(1, most // processes)


def run(
    entries: Sequence[Entry],
    work: Work,
    folder: Path,
    *,
    settings: str,
    engine: Literal["local", "ray"] = "local",
    processes: int = 1,
    cpus: int = 1,
    gpus: float = 0,
    meter: Meter | None = None,
) -> list[Row]:
    """Do `work` for each slide and write `folder`/manifest.csv.

    Args:
        entries: the slides.
        work: can be pickled where there are several processes.
        folder: OUT.
        settings: fingerprint of what `work` does; a folder of other settings is refused.
        engine: local, or ray.
        processes: slides at a time; with Ray, at most (0: as many as the cluster has).
        cpus: that a slide's threads take, for Ray to reckon with.
        gpus: that a slide takes, likewise.
        meter: shows progress.

    Returns:
        A row for each of `entries`.

    Raises:
        SlideError: the folder belongs to a run of other settings.
        OutputError: nothing more can be written.
    """
    claim(folder, settings)
    meter = meter or Meter(len(entries))
    told: dict[str, Row] = {}  # rows that no file may hold: busy slides, processes that died
    if engine == "ray":
        from slides.on_ray import each_on_ray

        rows = each_on_ray(entries, work, processes, cpus, meter, gpus)
    elif processes <= 1 or len(entries) < 2:
        rows = (work(entry, meter.patch) for entry in entries)
    else:
        rows = _each(entries, work, min(processes, len(entries)), meter)
    try:
        due = 0.0
        for row in rows:
            meter.slide(row["status"])
            if row["status"] in ("busy", "failed"):
                told[row["slide"]] = row
            if time.monotonic() >= due:
                began = time.monotonic()
                write_manifest(folder, entries, told)
                # Every slide's row is read for it: of large cohorts it is written less often, a twentieth of the time.
                due = time.monotonic() + max(_MANIFEST_EVERY, 20 * (time.monotonic() - began))
    finally:
        meter.say(last=True)
    return write_manifest(folder, entries, told)


def claim(folder: Path, settings: str) -> None:
    """Mark a folder as this run's, or refuse it.

    Raises:
        SlideError: it belongs to a run of other settings.
        OutputError: it cannot be written.
    """
    mark = folder / "state" / "settings"
    sweep_old(folder, ("manifest.csv", "index.parquet", "config.yaml"))
    sweep_old(mark.parent, ("settings",))
    try:
        found = orjson.loads(mark.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        write_whole(mark, orjson.dumps(settings))
        return
    if found != settings:
        raise SlideError(f"{folder} holds the output of other settings: choose another folder, or remove it")


_shared: list[Any] = []  # of a worker process: its two counters and the work


def _keep(counters: Any, work: Work) -> None:
    _shared[:] = [counters, work]


def _one(entry: Entry) -> Row:
    counters, work = _shared

    def tell(planned: int, done: int) -> None:
        counters[0] += planned
        counters[1] += done

    return work(entry, tell)


@contextmanager
def _bare_main(work: Work) -> Iterator[None]:
    """Let a new process not import the program that was started (`medclip` loads torch: 0.6 GB and seconds each)."""
    call = work.func if isinstance(work, functools.partial) else work
    program = sys.modules["__main__"]
    if getattr(call, "__module__", "__main__") != "__main__":
        sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = program


class _Worker:
    """A process of its own, made anew where it died: a pool of several would end all of them, and blame them all."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.context = multiprocessing.get_context("spawn")  # decoders have threads, which do not survive a fork
        self.start()

    def start(self) -> None:
        # Only the process writes and only this one reads, so there is no lock that a kill could leave held.
        self.counters = self.context.RawArray("q", 2)
        self.seen = [0, 0]
        self.pool = ProcessPoolExecutor(1, self.context, _keep, (self.counters, self.work))

    def submit(self, entry: Entry) -> Future[Row]:
        with _bare_main(self.work):
            try:
                return self.pool.submit(_one, entry)
            except BrokenProcessPool:  # it died while it had nothing to do
                self.start()
                return self.pool.submit(_one, entry)

    def news(self) -> tuple[int, int]:
        """Patches planned and done since the last call."""
        now = list(self.counters)
        before, self.seen = self.seen, now
        return now[0] - before[0], now[1] - before[1]


def _each(entries: Sequence[Entry], work: Work, processes: int, meter: Meter) -> Iterator[Row]:
    """Rows as they come. A slide whose process died is tried again."""
    tries = dict.fromkeys((entry.slide for entry in entries), 0)
    queue = deque(entries)
    workers = [_Worker(work) for _ in range(processes)]
    idle = list(workers)
    flying: dict[Future[Row], tuple[Entry, _Worker]] = {}
    try:
        while queue or flying:
            while queue and idle:
                entry, worker = queue.popleft(), idle.pop()
                flying[worker.submit(entry)] = entry, worker
            ready, _ = wait(flying, timeout=meter.every, return_when=FIRST_COMPLETED)
            for worker in workers:
                meter.patch(*worker.news())
            for future in ready:
                entry, worker = flying.pop(future)
                idle.append(worker)
                try:
                    row = future.result()
                except BrokenProcessPool:
                    worker.start()
                    tries[entry.slide] += 1
                    if tries[entry.slide] < _TRIES:
                        queue.appendleft(entry)
                        continue
                    row = _died(entry)
                yield row
    finally:
        for worker in workers:
            worker.pool.shutdown(wait=True, cancel_futures=True)


def _died(entry: Entry) -> Row:
    return {
        "slide": entry.slide,
        "path": entry.path,
        "status": "failed",
        "reason": f"its process died {_TRIES} times (out of memory?): give it fewer threads or a machine of its own",
        "patches": 0,
    }
