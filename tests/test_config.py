"""How a verb starts: one line for settings that no part takes, and folders that are somebody's or nobody's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from medclip.cli import main

TINY = [
    "experiment=tiny",
    "model=tiny_vit",
    "model.architecture.vision_cfg.image_size=32",
    "model.architecture.vision_cfg.layers=1",
    "model.architecture.text_cfg.layers=1",
    "data.workers=0",
    "data.batch_size=4",
]
SOURCE = "data.sources=[{phantoms: {kind: xray, samples: 8, size: 64}}]"


@pytest.fixture
def medclip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Run a command line in an empty folder; its exit status and the lines that it printed as errors."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["medclip", *words])
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, [line for line in capfd.readouterr().err.splitlines() if line.strip()]

    return call


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["+optim.foo=1"], "optim cannot be built: adamw() got an unexpected keyword argument 'foo'"),
        (["optim.lr=much"], "optim cannot be built"),
        (["optim._target_=medclip.optim.adamax"], "task.optimizer cannot be built"),
        (["+model.foo=1"], "task.model.model cannot be built: load_clip() got an unexpected keyword argument 'foo'"),
        (["data.batch_size=many"], "data.batch_size is 'many'"),
        (["trainer.precision=bf17"], "trainer cannot be built: Precision 'bf17' is invalid"),
        (["+trainer.limit_train_batches=-3"], "see trainer in"),  # what Lightning calls a misconfiguration
        (["loss=[]"], "there is no loss term"),
        (["seed=luck"], "seed=luck: give a whole number"),
        (["task.max_logit_scale=0"], "task.max_logit_scale is 0: it must be above 0"),
        (["+model.preprocess.mean=[0.5]"], "preprocess.mean=[0.5] must be three numbers"),
        (["data=shards"], "Missing mandatory value: data.sources.0.urls: say data.sources.0.urls=…"),
        (["output=/proc/nothing/here", "-m"], "cannot write to /proc/nothing"),
    ],
)
def test_settings_that_no_part_takes_are_one_line(medclip, words: list[str], says: str) -> None:
    status, lines = medclip("train", *TINY, *([] if "data=shards" in words else [SOURCE]), *words)
    assert status == 2, lines
    assert len(lines) == 1 and lines[0].startswith("medclip train: ") and says in lines[0], lines


def test_a_start_that_failed_is_not_in_the_way_of_the_next(medclip, tmp_path: Path) -> None:
    wrong = [*TINY, "data=shards", "data.sources.0.urls=nowhere/*.tar", "output=run"]
    for _ in range(2):
        status, lines = medclip("train", *wrong)
        assert status == 2 and "no shard matches" in lines[0]
    # A configuration that somebody else wrote is something.
    (tmp_path / "run/config.yaml").write_text("mine: 1\n")
    status, lines = medclip("train", *wrong)
    assert status == 2 and "is not empty" in lines[0]
    assert (tmp_path / "run/config.yaml").read_text() == "mine: 1\n"


def test_a_sweep_keeps_to_its_folder(medclip, tmp_path: Path) -> None:
    status, lines = medclip("train", "-m", *TINY, SOURCE, "output=sweep", "optim.lr=1e-3,1e-4")
    assert status == 0, lines
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"]
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["0", "1", "multirun.yaml"]
    assert (tmp_path / "sweep/1/metrics.csv").read_text().count("\n") == 3  # a run of two steps is recorded too
