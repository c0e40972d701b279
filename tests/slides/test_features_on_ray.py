"""Features on Ray, by workers with a GPU each: the same files, one model a worker, and a death costs nothing."""

from __future__ import annotations

import functools
import logging
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slides.errors import SlideError
from slides.feature_work import FeatureOutput
from slides.features_on_ray import features_on_ray
from slides.h5 import read_features
from tests.slides.runs import REQUEST, ToyEncoder, contents, entries_of, features, leftovers, quiet
from tests.slides.toys import toy_slide

FOLDER = "20x_64px_0px_overlap/features_toy"


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        # Workers import the tests, as a user's workers import what is installed.
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        # Ray takes our word for the GPUs, and hands their numbers out.
        before = signal.getsignal(signal.SIGTERM)
        ray.init(num_cpus=2, num_gpus=2, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
        yield ray
        ray.shutdown()
        signal.signal(signal.SIGTERM, before)  # Ray leaves its own, which forked children of later tests would have


class Watched(ToyEncoder):
    """Notes its making and whose GPU it sees; the first worker that has made a batch is killed at its second."""

    def __init__(self, folder: Path, weights: str = "w") -> None:
        super().__init__()
        self.folder, self.fingerprint, self.calls = folder, weights, 0
        (folder / f"made-{os.getpid()}-{os.environ.get('CUDA_VISIBLE_DEVICES')}").touch(exist_ok=False)

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        self.calls += 1
        if self.calls == 2 and not (self.folder / "killed").exists():
            (self.folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(patches)


def on_ray(
    paths: list[Path], folder: Path, notes: Path, weights: str = "w", here: str = "w", **options: Any
) -> list[dict[str, Any]]:
    notes.mkdir(exist_ok=True)
    own = ToyEncoder()
    own.fingerprint = here  # type: ignore[attr-defined]
    make = functools.partial(Watched, notes, weights)
    output = FeatureOutput(str(folder), batch_size=8, block=8)
    return features_on_ray(entries_of(paths), REQUEST, output, make, own, meter=quiet(), **options).rows


def test_each_worker_makes_the_model_once_on_its_gpu(cluster: Any, tmp_path: Path) -> None:
    paths = [toy_slide(tmp_path / f"in/s{n}.svs", 800, 700, seed=n, downsamples=(1,)).path for n in range(5)]
    paths.append(tmp_path / "in/gone.svs")
    rows = on_ray(paths, tmp_path / "ray", tmp_path / "notes", gpus=1)
    assert [row["status"] for row in rows] == ["ok"] * 5 + ["failed"]
    assert (tmp_path / "notes/killed").exists()
    made = [path.name.split("-") for path in (tmp_path / "notes").glob("made-*")]
    assert {gpu for _, _, gpu in made} <= {"0", "1"} and len(made) == len({pid for _, pid, _ in made})
    assert len(made) <= 4  # of two workers and those in their place, for six slides
    features(paths, tmp_path / "local", batch_size=8, block=8)
    found, wanted = contents(tmp_path / "ray" / FOLDER), contents(tmp_path / "local" / FOLDER)
    names = [f"s{n}.h5" for n in range(5)]
    for name in names:
        ours, theirs = (read_features(tmp_path / where / FOLDER / name) for where in ("ray", "local"))
        assert np.array_equal(ours[0], theirs[0]) and np.array_equal(ours[1], theirs[1])
    assert set(found) == set(wanted) and leftovers(tmp_path / "ray") == []


def test_other_weights_in_a_worker_are_refused(cluster: Any, tmp_path: Path) -> None:
    path = toy_slide(tmp_path / "in/s0.svs", 600, 500).path
    with pytest.raises(SlideError, match=r"^a worker's toy has other weights than here"):
        on_ray([path], tmp_path / "out", tmp_path / "notes", weights="v", here="x", gpus=0.5)


def test_gpus_that_no_machine_has_are_not_waited_for(cluster: Any, tmp_path: Path) -> None:
    with pytest.raises(SlideError, match="has more than 2; say gpus=0 for CPUs"):
        on_ray([tmp_path / "a.svs"], tmp_path / "out", tmp_path / "notes", gpus=3)
