"""Cohorts by processes: what dies is tried again, alone to blame; what cannot be written ends the run."""

from __future__ import annotations

import csv
import functools
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from slides.entry import Entry
from slides.errors import SlideError
from slides.extract import Output, extract_slide
from slides.files import OutputError, alone
from slides.run import claim, cores, run, split_cores
from tests.slides.runs import REQUEST, ROOT, contents, entries_of, extract, leftovers, quiet
from tests.slides.toys import toy_slide


def entries(*names: str) -> list[Entry]:
    return [Entry(name, f"/data/{name}.svs") for name in names]


def calls_of(folder: Path, slide: str) -> int:
    path = folder / f"{slide}.calls"
    return path.stat().st_size if path.exists() else 0


def fragile(entry: Entry, progress: Any, folder: Path) -> dict[str, Any]:
    """`dies` always kills its process, `once` the first time; `full` finds the disk full.

    `slow` waits until `dies` has died three times, `waits` until `full` has been begun.
    """
    progress(10, 0)
    with (folder / f"{entry.slide}.calls").open("a") as file:
        file.write("x")
    calls = calls_of(folder, entry.slide)
    if entry.slide == "dies" or (entry.slide == "once" and calls == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    progress(0, 10)
    if entry.slide == "full":
        raise OutputError("cannot write x (No space left on device): make room")
    for name, other, many in (("slow", "dies", 3), ("waits", "full", 1)):
        while entry.slide.startswith(name) and calls_of(folder, other) < many:
            os.sched_yield()
    return {"slide": entry.slide, "path": entry.path, "status": "ok", "reason": "", "patches": 10}


def test_a_process_that_dies_is_tried_again_and_at_last_reported(tmp_path: Path) -> None:
    cohort = entries("slow", "dies", "once", "a", "b")
    meter = quiet(5)
    work = functools.partial(fragile, folder=tmp_path)
    rows = run(cohort, work, tmp_path / "out", settings="s", processes=2, meter=meter)
    # Rows of slides that wrote none themselves are kept only while the run lasts.
    by = {row["slide"]: row for row in rows}
    assert by["dies"]["status"] == "failed" and "its process died 3 times" in by["dies"]["reason"]
    calls = Counter({path.stem: path.stat().st_size for path in tmp_path.glob("*.calls")})
    # The neighbour of the one that dies is neither ended with it nor blamed for it.
    assert calls == {"slow": 1, "dies": 3, "once": 2, "a": 1, "b": 1}
    assert (meter.done, meter.failed) == (5, 1)
    with (tmp_path / "out/manifest.csv").open(newline="") as file:
        assert {row["slide"]: row["status"] for row in csv.DictReader(file)}["dies"] == "failed"


def test_patches_of_other_processes_are_counted(tmp_path: Path) -> None:
    meter = quiet(6)
    run(
        entries(*"abcdef"),
        functools.partial(fragile, folder=tmp_path),
        tmp_path,
        settings="s",
        processes=2,
        meter=meter,
    )
    assert (meter.planned, meter.patches) == (60, 60)


@pytest.mark.parametrize("processes", [1, 2])
def test_what_cannot_be_written_ends_the_run(tmp_path: Path, processes: int) -> None:
    work = functools.partial(fragile, folder=tmp_path)
    cohort = entries("full", *(f"waits {n}" for n in range(40)))
    with pytest.raises(OutputError, match="make room"):
        run(cohort, work, tmp_path, settings="s", processes=processes, meter=quiet())
    assert len(list(tmp_path.glob("waits*.calls"))) < 20


PROGRAM = """
import functools, sys
from pathlib import Path
from slides.entry import Entry
from slides.run import run
from tests.slides.runs import quiet
from tests.slides.test_run import fragile
print("the program was imported", flush=True)

def own(entry, progress, folder):
    return fragile(entry, progress, folder)

if __name__ == "__main__":
    folder, call = Path(sys.argv[1]), {"slides": fragile, "own": own}[sys.argv[2]]
    work = functools.partial(call, folder=folder)
    rows = run([Entry(n, n) for n in "abc"], work, folder / "out", settings="s", processes=2, meter=quiet())
    print([row["status"] for row in rows])
"""


@pytest.mark.parametrize(("call", "imports"), [("slides", 1), ("own", 3)])
def test_processes_do_not_import_the_program_unless_the_work_is_in_it(tmp_path: Path, call: str, imports: int) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path), call]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["the program was imported"] * imports + ["['pending', 'pending', 'pending']"], (
        done.stderr
    )


def one_slide(entry: Entry, progress: Any, output: Output) -> dict[str, Any]:
    return extract_slide(entry, REQUEST, output, progress=progress)


def test_several_processes_write_what_one_writes(tmp_path: Path) -> None:
    paths = [toy_slide(tmp_path / f"in/s{n}.svs", 600, 500, seed=n).path for n in range(5)]
    paths.append(tmp_path / "in/gone.svs")
    extract(paths, tmp_path / "one")
    output = Output(str(tmp_path / "two"), ("shards", "images", "arrays", "coords"), per_shard=7)
    cohort, mark = entries_of(paths, patient="p 1"), output.fingerprint(REQUEST)
    work = functools.partial(one_slide, output=output)
    with alone(output.path / "state/s3.lock"):
        rows = run(cohort, work, output.path, settings=mark, processes=2, meter=quiet())
    assert [row["status"] for row in rows] == ["ok"] * 3 + ["busy", "ok", "failed"]
    rows = run(cohort, work, output.path, settings=mark, processes=2, meter=quiet())
    assert [row["status"] for row in rows] == ["ok"] * 5 + ["failed"]
    assert contents(tmp_path / "one") == contents(tmp_path / "two") and leftovers(tmp_path / "two") == []


def test_a_folder_is_one_run_s(tmp_path: Path) -> None:
    claim(tmp_path / "out", "a")
    claim(tmp_path / "out", "a")
    with pytest.raises(SlideError, match=r"out holds the output of other settings: choose another folder, or remove"):
        claim(tmp_path / "out", "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another output folder"):
        claim(tmp_path / "file", "a")


def test_cores_are_split_between_slides_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cores() >= 1
    monkeypatch.setattr("slides.run.cores", lambda: 8)
    assert split_cores(100) == (8, 1) and split_cores(2) == (2, 4) and split_cores(1) == (1, 8)
    assert split_cores(100, processes=3) == (3, 2) and split_cores(100, 16) == (16, 1)
    assert split_cores(100, threads=5) == (8, 5) and split_cores(0) == (1, 8)
