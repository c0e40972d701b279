"""The cohort on Ray, started here with two workers, one of which is killed: nothing is missing, nothing differs."""

from __future__ import annotations

import functools
import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from slides.entry import Entry
from slides.errors import SlideError
from slides.extract import Output, extract_slide
from slides.files import OutputError
from slides.run import run
from tests.slides.runs import REQUEST, contents, entries_of, extract, leftovers, quiet
from tests.slides.toys import break_header, toy_slide

SAVE = ("shards", "coords")


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        # Workers import the tests, as a user's workers import what is installed.
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        before = signal.getsignal(signal.SIGTERM)
        ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
        yield ray
        ray.shutdown()
        signal.signal(signal.SIGTERM, before)  # Ray leaves its own, which forked children of later tests would have


def work(entry: Entry, progress: Any, output: Output, folder: Path) -> dict[str, Any]:
    """Extract a slide; the worker that first has `s3` in hand is killed in the middle of it."""
    if entry.slide == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if entry.slide == "full":
        raise OutputError("cannot write x (No space left on device): make room")

    def tell(planned: int, done: int) -> None:
        if done and entry.slide == "s3" and not (folder / "killed").exists():
            (folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return extract_slide(entry, REQUEST, output, progress=tell)


def on_ray(paths: list[Path], folder: Path, out: str, **options: Any) -> list[dict[str, Any]]:
    output = Output(str(folder / out), SAVE, per_shard=7)
    cohort = entries_of(paths, patient="p 1")
    mark = output.fingerprint(REQUEST)
    call = functools.partial(work, output=output, folder=folder)
    return run(cohort, call, output.path, settings=mark, engine="ray", meter=quiet(), **options)


def test_a_killed_worker_costs_nothing(cluster: Any, tmp_path: Path) -> None:
    paths = [toy_slide(tmp_path / f"in/s{n}.svs", 600, 500, seed=n, downsamples=(1,)).path for n in range(7)]
    break_header(paths[5], column=1, row=1)
    paths.append(tmp_path / "in/gone.svs")
    rows = on_ray(paths, tmp_path, "ray", processes=2)
    assert (tmp_path / "killed").exists()
    assert [row["status"] for row in rows] == ["ok"] * 7 + ["failed"]
    extract(paths, tmp_path / "local", save=SAVE)
    assert contents(tmp_path / "ray") == contents(tmp_path / "local") and leftovers(tmp_path / "ray") == []
    assert cluster.is_initialized()  # a cluster that was there before stays


def test_a_slide_that_kills_every_worker_is_reported(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slides.on_ray._RETRIES", 1)
    path = toy_slide(tmp_path / "in/s0.svs", 600, 500).path
    rows = on_ray([tmp_path / "in/dies.svs", path], tmp_path, "out")
    assert [row["status"] for row in rows] == ["failed", "ok"]
    assert rows[0]["reason"] and "\n" not in rows[0]["reason"]


def test_what_cannot_be_written_ends_the_run(cluster: Any, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="make room"):
        on_ray([tmp_path / "in/full.svs"], tmp_path, "out")


def test_without_ray_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SlideError, match=r"^engine=ray needs Ray: pip install 'medclip-adapt\[ray\]'$"):
        on_ray([tmp_path / "a.svs"], tmp_path, "out")
