"""`medclip train` as users run it: a kill at any step changes nothing, and bad input gets one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from medclip.config import CONF
from medclip.train import forget_run, train
from medclip.types import UserError

SMALL = [
    "experiment=tiny",
    "model=tiny_vit",
    "model.architecture.vision_cfg.image_size=32",
    "model.architecture.vision_cfg.layers=1",
    "+model.architecture.vision_cfg.patch_dropout=0.25",  # something random inside the towers
    "model.architecture.vision_cfg.width=64",
    "model.architecture.text_cfg.layers=1",
    "model.architecture.text_cfg.width=32",
    "model.architecture.text_cfg.context_length=16",
    "callbacks=[default,stream]",
    "callbacks.checkpoint.every_n_steps=2",
    "trainer.log_every_n_steps=1",
    "data.batch_size=8",
    "epochs=2",
]


def overrides(shards: Path, output: Path, *more: str) -> list[str]:
    source = f'data.sources=[{{urls: "{shards}/*.tar"}}]'
    return [*SMALL, source, f"output={output}", "data.workers=0", *more]


def run(*words: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", list(words))
    return train(cfg)


def start(*words: str, **kwargs) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "medclip.cli", "train", *words], env=environment, **kwargs)


def stream(folder: Path, rank: int = 0) -> list[dict]:
    path = folder / f"stream-{rank}.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_for(condition, process: subprocess.Popen, seconds: float = 180) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < until
        time.sleep(0.02)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory) -> Path:
    """The run that nobody disturbs."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(*overrides(shards, folder))
    return folder


def test_every_epoch_sees_each_sample_once(whole: Path) -> None:
    rows = stream(whole)
    for epoch in (0, 1):
        keys = [key for row in rows if row["epoch"] == epoch for key in row["keys"]]
        assert len(keys) == len(set(keys)) == 65
    assert len(rows) == 2 * 9


def test_kill_9_and_resume_with_other_workers_is_the_same_run(whole: Path, shards: Path, tmp_path: Path) -> None:
    """Killed in the middle of an epoch with two workers, resumed with none: same keys, pixels, losses and weights."""
    folder = tmp_path / "run"
    process = start(*overrides(shards, folder, "data.workers=2"))
    wait_for(lambda: len(stream(folder)) >= 5, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 5 <= len(stream(folder)) < 18
    run(*overrides(shards, folder, "resume=auto"))
    assert stream(folder) == stream(whole)
    ours, theirs = weights(folder), weights(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_sigterm_saves_and_exits_cleanly(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = overrides(shards, folder, "epochs=500", "callbacks.checkpoint.every_n_steps=100000", "data.workers=1")
    process = start(*words, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(stream(folder)) >= 2, process)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "resume=auto" in errors and "Traceback" not in errors
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == len(stream(folder))


def test_two_ranks_share_the_stream_and_resume_on_one(shards: Path, tmp_path: Path) -> None:
    """Two gloo ranks, killed; gone on with by one rank: over the whole epoch no sample is lost or doubled."""
    folder = tmp_path / "run"
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true"]
    common = [
        *overrides(shards, folder, "epochs=1", "data.batch_size=5", "callbacks.checkpoint.every_n_steps=1"),
    ]
    process = start(*common, *ddp, start_new_session=True)
    wait_for(lambda: len(stream(folder, 0)) >= 4 and len(stream(folder, 1)) >= 3, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    state = next(value for key, value in saved.items() if key == "PairData")
    done = state["batches"]
    before = [key for rank in (0, 1) for row in stream(folder, rank)[:done] for key in row["keys"]]
    assert len(before) == state["position"]
    run(*common, "resume=auto")
    after = [key for row in stream(folder)[done:] for key in row["keys"]]
    assert len(before) + len(after) == 65
    assert len({*before, *after}) == 65


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["data.sources=[{urls: /nowhere/*.tar}]"], "no shard matches"),
        (["data.sources=[]"], "data.sources is empty"),
        (["data.decode=fancy"], "fast or exact"),
        (["resume=/nowhere/x.ckpt"], "no such checkpoint"),
    ],
)
def test_bad_input_is_one_line(change: list[str], says: str, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        run(*overrides(shards, tmp_path / "run", *change))


def test_existing_output_is_refused_and_left_alone(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        run(*overrides(shards, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_new_run_goes_on_from_nothing_of_the_one_that_it_overwrites(shards: Path, tmp_path: Path) -> None:
    """Overwritten and killed before its first checkpoint, then resumed: it starts afresh, in step with the new run."""
    folder = tmp_path / "run"
    run(*overrides(shards, folder, "epochs=1", "seed=7"))
    never = "callbacks.checkpoint.every_n_steps=100000"
    process = start(*overrides(shards, folder, "overwrite=true", "epochs=500", never))
    # The old run's lines stand until the new one starts.
    wait_for(lambda: len(stream(folder)) >= 1 and not (folder / "checkpoints" / "last.ckpt").exists(), process)
    process.kill()
    process.wait()
    assert not (folder / "checkpoints" / "last.ckpt").exists()
    trainer = run(*overrides(shards, folder, "resume=auto", "epochs=1"))
    assert trainer.global_step == len(stream(folder)) == 9
    steps = [line.split(",")[0] for line in (folder / "metrics.csv").read_text().splitlines()[1:]]
    assert steps == [str(step) for step in range(9)]


def test_a_new_run_forgets_what_would_pass_for_its_own(tmp_path: Path) -> None:
    """Its checkpoints, curves and sheets go; what else lies there, and what people made of them, stays."""
    old = ["checkpoints/last.ckpt", "checkpoints/best.ckpt", "reconstructions/epoch-0010.png", "metrics.csv"]
    old += ["skipped.jsonl", "stream-0.jsonl", "stream-1.jsonl", "wandb_id"]
    others = ["checkpoints/mine.ckpt", "reconstructions/notes.txt", "config.yaml", "thesis.png"]
    for name in (*old, *others):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    forget_run(tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == set(others)
    forget_run(tmp_path)  # nothing left to forget


def test_a_run_that_is_complete_says_so(whole: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (whole / "checkpoints" / "last.ckpt").read_bytes()
    run(*overrides(shards, whole, "resume=auto"))
    assert "nothing left to train" in capsys.readouterr().err
    assert (whole / "checkpoints" / "last.ckpt").read_bytes() == before


def test_resume_with_another_model_or_other_data_is_refused(whole: Path, shards: Path) -> None:
    resume = f"resume={whole}/checkpoints/last.ckpt"
    before = (whole / "checkpoints" / "last.ckpt").read_bytes()
    with pytest.raises(UserError, match="another model"):
        run(*overrides(shards, whole, resume, "model.architecture.vision_cfg.layers=2"))
    with pytest.raises(UserError, match="cannot resume"):
        run(*overrides(shards, whole, resume, f'data.sources=[{{urls: "{shards}/0000[01].tar"}}]'))
    assert (whole / "checkpoints" / "last.ckpt").read_bytes() == before


def test_too_many_bad_samples_stop_the_run(shards: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    for path in shards.glob("*.tar"):
        content = path.read_bytes()
        (bad / path.name).write_bytes(content.replace(b"\xff\xd8\xff\xe0", b"\x00\x00\x00\x00", 20))
    with pytest.raises(UserError, match=r"samples are bad .*max_bad_fraction"):
        run(*overrides(bad, tmp_path / "run"))
    listed = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert listed and all(row["reason"] == "broken image" and row["key"] for row in listed)
    assert (tmp_path / "run" / "checkpoints").is_dir()
