"""Features of a cohort by Ray: one task a slide, the model made once in each worker, on its GPU where it has one.

The blocks of a slide are on disk as soon as they are made, so that a worker's death costs one block. All machines see
OUT, the slides and the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from slides.entry import Entry
from slides.errors import SlideError
from slides.feature_work import FeatureOutput, Told
from slides.features import Encoder, Report, claimed, features_of_one, marked, write_index
from slides.progress import Meter
from slides.request import Request
from slides.run import run

Make = Callable[[], Encoder]
_made: dict[str, Encoder] = {}  # of a worker, which has many slides in turn: the mark of the settings -> the model


def features_on_ray(
    entries: Sequence[Entry],
    request: Request,
    output: FeatureOutput,
    make: Make,
    encoder: Encoder,
    *,
    gpus: float = 0,
    at_once: int = 0,
    threads: int = 1,
    meter: Meter | None = None,
    written_one: Told | None = None,
) -> Report:
    """Write the features of every slide that has none yet, as `extract_features` does.

    Args:
        entries: the slides.
        request: which patches; its size is the encoder's input.
        output: where to.
        make: makes the model in a worker; must be picklable.
        encoder: the same model here, of which only name and fingerprint count.
        gpus: of a task; 0.5 lets two slides share one.
        at_once: slides at a time at most; 0: as many as the cluster has room for.
        threads: that read a slide.
        meter: shows progress.
        written_one: told of each slide's plan, file and features, in the worker; must be picklable.

    Raises:
        SlideError: OUT holds features of other settings; Ray is not installed, or has nowhere so many GPUs.
        OutputError: nothing more can be written.
    """
    folder, mark = claimed(request, output, encoder)
    work = functools.partial(
        one_slide, request=request, output=output, make=make, mark=mark, threads=threads, written_one=written_one
    )
    try:
        rows = run(
            entries, work, folder, settings=mark, engine="ray", processes=at_once, cpus=threads, gpus=gpus, meter=meter
        )
    finally:
        write_index(folder, entries, output.format)
    return Report(rows, float("nan"))


def one_slide(
    entry: Entry,
    progress: Callable[[int, int], None],
    *,
    request: Request,
    output: FeatureOutput,
    make: Make,
    mark: str,
    threads: int,
    written_one: Told | None,
) -> dict[str, Any]:
    """The features of one slide, in a worker; its row.

    Raises:
        SlideError: the worker has another model under the name, and so another mark.
        OutputError: nothing more can be written.
    """
    if mark not in _made:
        _made.clear()  # a worker of the last run's settings has no use for its model any more
        _made[mark] = make()
    encoder = _made[mark]
    folder, own = marked(request, output, encoder)
    if own != mark:
        raise SlideError(f"a worker's {encoder.name} has other weights than here: give all machines the same file")
    return features_of_one(entry, folder, mark, request, output, encoder, threads, written_one)
