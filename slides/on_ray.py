"""The Ray engine: one task a slide, tried again where a worker or its machine dies. All machines see OUT."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from slides.entry import Entry
from slides.errors import SlideError
from slides.files import OutputError
from slides.progress import Meter

_RETRIES = 5


def each_on_ray(
    entries: Sequence[Entry],
    work: Callable[[Entry, Callable[[int, int], None]], dict[str, Any]],
    at_once: int,
    cpus: int,
    meter: Meter,
    gpus: float = 0,
) -> Iterator[dict[str, Any]]:
    """Rows as they come, from the cluster that `RAY_ADDRESS` names, or from one that is started here.

    A task that dies with its worker runs again and goes on where it was, since its lock dies with it and its blocks
    are on disk.

    Raises:
        SlideError: Ray is not installed, or no machine of the cluster has so many GPUs.
        OutputError: nothing more can be written.
    """
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise SlideError("engine=ray needs Ray: pip install 'medclip-adapt[ray]'") from None
    own = not ray.is_initialized()
    if own:
        ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
    try:
        if gpus:
            _check_gpus(ray.nodes(), gpus)
    except SlideError:
        if own:
            ray.shutdown()
        raise
    # Else a task with a GPU ends its worker, and with it the model that the next one needs.
    task = ray.remote(max_retries=_RETRIES, num_cpus=cpus, num_gpus=gpus, max_calls=0)(_do)
    shared = ray.put(work)
    waiting = list(entries)
    flying: dict[Any, Entry] = {}
    try:
        while waiting or flying:
            while waiting and (at_once < 1 or len(flying) < at_once):
                entry = waiting.pop(0)
                flying[task.remote(shared, entry)] = entry
            ready, _ = ray.wait(list(flying), timeout=meter.every)
            meter.say()
            for reference in ready:
                entry = flying.pop(reference)
                try:
                    row = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    cause = error.cause
                    raise (cause if isinstance(cause, OutputError | SlideError) else error) from None
                except ray.exceptions.RayError as error:
                    words = " ".join(str(error).split())[:200]
                    row = {"slide": entry.slide, "path": entry.path, "status": "failed", "reason": words, "patches": 0}
                meter.patch(row["patches"], row["patches"])
                yield row
    finally:
        for reference in flying:
            ray.cancel(reference, force=True)
        if own:
            ray.shutdown()


def _check_gpus(nodes: Sequence[dict[str, Any]], gpus: float) -> None:
    """Else Ray would wait for them for ever."""
    most = max((node["Resources"].get("GPU", 0) for node in nodes if node["Alive"]), default=0)
    if most < gpus:
        raise SlideError(f"gpus={gpus:g}: no machine of the Ray cluster has more than {most:g}; say gpus=0 for CPUs")


def _do(work: Callable[[Entry, Callable[[int, int], None]], dict[str, Any]], entry: Entry) -> dict[str, Any]:
    return work(entry, lambda planned, done: None)
