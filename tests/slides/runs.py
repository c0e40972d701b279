"""What a run left behind, as values that can be compared; and runs that are killed again and again until they are done.

python -m tests.slides.runs extract|features SEED OUT SLIDE...
"""

from __future__ import annotations

import csv
import io
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import orjson

from slides.cohort import name_of
from slides.entry import Entry
from slides.extract import Output, extract_slide
from slides.features import FeatureOutput, extract_features
from slides.progress import Meter
from slides.request import Request
from slides.run import run

ROOT = Path(__file__).parents[2]
REQUEST = Request(size=64, mpp=0.5, coverage=0.2, min_area=100.0, fill_holes=0.0)
SAVE = ("shards", "images", "arrays", "coords")


def entries_of(paths: list[Path], **extra: Any) -> list[Entry]:
    return [Entry(name_of(path), str(path), extra=extra) for path in paths]


def quiet(slides: int = 1) -> Meter:
    """A meter that says nothing."""
    return Meter(slides, every=0.02, out=io.StringIO())


def extract(paths: list[Path], out: Path, request: Request = REQUEST, **options: Any) -> list[dict[str, Any]]:
    """All that can be saved of some slides, in blocks of seven, in this process."""
    output = Output(str(out), **({"save": SAVE, "per_shard": 7} | options))

    def work(entry: Entry, progress: Callable[[int, int], None]) -> dict[str, Any]:
        return extract_slide(entry, request, output, progress=progress)

    mark = output.fingerprint(request)
    return run(entries_of(paths, patient="p 1"), work, output.path, settings=mark, meter=quiet(len(paths)))


class ToyEncoder:
    """Sums of a patch's 4 x 4 fields, exact in float32 whatever the batch; remembers the sizes of its batches."""

    name = "toy"

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        self.batches.append(len(patches))
        sys.audit("toy.encode")
        n, side = len(patches), patches.shape[1]
        fields = patches.reshape(n, 4, side // 4, 4, side // 4, 3).sum(axis=(2, 4), dtype=np.int64)
        return fields.reshape(n, 48).astype(np.float32)


def features(paths: list[Path], out: Path, request: Request = REQUEST, encoder: Any = None, **options: Any) -> Any:
    """Features in batches of eight and blocks of ten."""
    output = FeatureOutput(str(out), **({"batch_size": 8, "block": 10} | options))
    encoder = encoder or ToyEncoder()
    return extract_features(entries_of(paths), request, output, encoder, threads=1, meter=quiet(len(paths)))


def contents(out: Path) -> dict[str, Any]:
    """Every file of an output folder by name: bytes, or what stands in it where bytes hold the folder or the time."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name = str(path.relative_to(out))
        if path.suffix == ".lock" or (path.name.startswith(".") and path.name.endswith(".part")):
            continue
        if path.suffix == ".h5":
            with h5py.File(path) as file:
                for key, data in file.items():
                    attributes = {k: str(v).replace(str(out), "OUT") for k, v in data.attrs.items()}
                    found[f"{name}:{key}"] = (data.dtype, data.shape, data[:].tobytes(), attributes)
        elif path.name == "manifest.csv":
            with path.open(newline="") as file:
                found[name] = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
        elif path.parent.name == "state" and path.suffix == ".json":
            found[name] = {k: v for k, v in orjson.loads(path.read_bytes()).items() if k != "seconds"}
        else:
            found[name] = path.read_bytes()
    return found


def leftovers(out: Path) -> list[str]:
    """What should not be there when all is done. (A kill can leave a table's half, which goes when it is old.)"""
    parts = [path for path in out.rglob("*.part") if not path.name.startswith((".manifest.csv.", ".index.parquet."))]
    folders = [path for state in out.rglob("state") for path in state.iterdir() if path.is_dir()]
    return sorted(str(path.relative_to(out)) for path in parts + folders)


def killed(kind: str, paths: list[Path], out: Path, seed: int) -> int:
    """Run it in a process that is killed at random places until it comes to its end; how many kills that took."""
    command = [sys.executable, "-m", "tests.slides.runs", kind, str(seed), str(out), *map(str, paths)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "fcntl.flock", "toy.encode"}


def _until_done(work: Callable[[], object], seed: int) -> int:
    rng = random.Random(seed)
    kills = 0
    while True:
        last = rng.randrange(1, 60) if kills < 40 else 1 << 30
        child = os.fork()
        if not child:
            _work_until(work, last)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return kills
        kills += 1


def _work_until(work: Callable[[], object], last: int) -> None:
    """Work, and be killed at the `last` time that a file is opened, renamed, removed, or the model called."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in _EVENTS and not str(arguments[:1]).endswith((".py',)", ".pyc',)", ".so',)")):
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    try:
        work()
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    kind, seed, out, *slides = sys.argv[1:]
    call = {"extract": extract, "features": features}[kind]
    print(_until_done(lambda: call([Path(slide) for slide in slides], Path(out)), int(seed)))
