"""SLURM's USR1: the step is finished, saved, the job queued again; gone on with, it is the undisturbed run."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir

from medclip.callbacks.graceful import slurm_job
from medclip.config import CONF
from medclip.train import train

ROOT = Path(__file__).parents[2]
WORDS = [
    *("experiment=tiny", "model=tiny_vit", "model.architecture.vision_cfg.layers=1", "data.batch_size=4"),
    *("model.architecture.text_cfg.layers=1", "callbacks=[default]", "trainer=cpu", "data.workers=0", "epochs=2"),
    "data.sources=[{phantoms: {kind: xray, samples: 12, size: 64, seed: 0}}]",
    "+model.architecture.vision_cfg.patch_dropout=0.25",  # something random
    "trainer.log_every_n_steps=1",
]
SLURM = {
    **{"SLURM_JOB_ID": "4242", "SLURM_JOB_NAME": "medclip", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"},
    **{"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NNODES": "1"},
}


class Signalled(pl.Callback):
    """Sends this process a signal within a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_) -> None:  # pyright: ignore
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGUSR1)


def run(output: Path, *words: str, step: int | None = None) -> pl.Trainer:
    signalled = [f"+callbacks.signalled={{_target_: {__name__}.Signalled, step: {step}}}"] if step is not None else []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return train(compose("train", [*WORDS, f"output={output}", *words, *signalled]))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job of one task, and a `scontrol` that writes down what it is told."""
    told = tmp_path / "told"
    command = tmp_path / "bin" / "scontrol"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\necho "$@" >> {told}\n')
    command.chmod(command.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    return told


def test_usr1_saves_requeues_and_goes_on_to_the_bit(slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.set_num_threads(1)
    whole = run(tmp_path / "whole", "resume=auto")
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "run", "resume=auto", step=2)
    assert stopped.value.code == 128 + signal.SIGUSR1
    assert slurm.read_text() == "requeue 4242\n"
    assert "job 4242 is queued again" in capsys.readouterr().err
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 3  # the step in which the signal came is finished
    assert not list(tmp_path.rglob("hpc_ckpt*"))  # Lightning's own, which would come before resume=auto
    again = run(tmp_path / "run", "resume=auto")
    assert again.global_step == whole.global_step == 6
    ours, theirs = (t.lightning_module.state_dict() for t in (again, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_requeue_that_slurm_refuses_is_said(slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\necho 'Requeue disabled' >&2\nexit 1\n")
    with pytest.raises(SystemExit):
        run(tmp_path / "run", "resume=auto", step=0)
    assert "could not be queued again (Requeue disabled): submit it once more" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()


def test_which_job_is_ours(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert slurm_job() == "4242"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "77")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert slurm_job() == "77_3"
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")  # a shell in an allocation: nobody wants that started again
    assert slurm_job() == ""


def test_the_batch_script_starts_one_task_a_gpu_and_resumes(slurm: Path, tmp_path: Path) -> None:
    """Run by bash with a `srun` that prints what it would start: these words compose."""
    srun = tmp_path / "bin" / "srun"
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(srun.stat().st_mode | stat.S_IEXEC)
    script = ROOT / "scripts" / "slurm" / "train.sbatch"
    env = {**os.environ, "SLURM_NNODES": "4", "SLURM_NTASKS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "8"}
    done = subprocess.run(["bash", script, "name=a b", "seed=1"], env=env, capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    assert words[1:3] == ["medclip", "train"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [*words[3:-2], words[-1]])
    assert (cfg.trainer.num_nodes, cfg.trainer.devices, cfg.resume, cfg.seed) == (4, 8, "auto", 1)
    assert words[-2] == "name=a b"  # words with spaces stay one
    text = script.read_text()
    assert re.search(r"^#SBATCH --requeue$", text, re.M) and re.search(r"^#SBATCH --signal=USR1@", text, re.M)


def test_the_launcher_composes_with_our_values() -> None:
    """As the batch script: the same signal, queued again, one task a GPU."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        words = ["hydra/launcher=medclip_slurm", "hydra.launcher.partition=gpu", "output=runs/sweep"]
        launcher = compose("train", words, return_hydra_config=True).hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher") and launcher.partition == "gpu"
    batch = (ROOT / "scripts" / "slurm" / "train.sbatch").read_text()
    assert f"#SBATCH --signal={launcher.additional_parameters.signal}" in batch
    assert launcher.additional_parameters.requeue is True and launcher.timeout_min == 24 * 60
    assert (launcher.tasks_per_node, launcher.gpus_per_node, launcher.cpus_per_task) == (1, 1, 8)


@pytest.mark.slow
def test_the_launcher_queues_a_script_that_is_signalled_and_queued_again(slurm: Path, tmp_path: Path) -> None:
    """A `sbatch` that keeps what it is given, and refuses it, for the launcher would wait."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    kept = tmp_path / "kept.sh"
    for name, text in {"sbatch": f'cp "$1" {kept}; echo no >&2; exit 1', "srun": "true"}.items():
        command = tmp_path / "bin" / name
        command.write_text(f"#!/bin/sh\n{text}\n")
        command.chmod(command.stat().st_mode | stat.S_IEXEC)
    words = [*WORDS, f"output={tmp_path / 'sweep'}", "seed=0,1", "hydra/launcher=medclip_slurm"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run([sys.executable, "-m", "medclip.cli", "train", "-m", *words], env=env, capture_output=True)
    assert done.returncode != 0
    lines = kept.read_text().splitlines()
    for line in ("--requeue", "--signal=USR1@120", "--time=1440", "--gpus-per-node=1", "--array=0-1%2"):
        assert f"#SBATCH {line}" in lines, lines
    assert lines.index("export OMP_NUM_THREADS=1") < next(i for i, line in enumerate(lines) if "srun" in line[:5])


@pytest.mark.slow
def test_torchrun_is_trainer_devices(tmp_path: Path) -> None:
    """Two processes started by torchrun, or by Lightning: the same weights after three steps."""
    words = [*WORDS, "trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=32-true", "max_steps=3"]
    words = [word for word in words if word != "trainer=cpu"] + ["trainer.devices=2", "data.batch_size=2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29631"]
    for name, start in (("torchrun", [*torchrun, "-m"]), ("lightning", [sys.executable, "-m"])):
        subprocess.run([*start, "medclip.cli", "train", *words, f"output={tmp_path / name}"], env=env, check=True)
    ours, theirs = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("torchrun", "lightning")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.slow
def test_submitit_runs_a_sweep(tmp_path: Path) -> None:
    """Two jobs, started on this machine as they would be by SLURM."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    words = [*WORDS, f"output={tmp_path / 'sweep'}", "max_steps=1", "seed=0,1", "hydra/launcher=submitit_local"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "medclip.cli", "train", "-m", *words], env=env, check=True)
    for job in (0, 1):
        saved = torch.load(tmp_path / "sweep" / str(job) / "checkpoints" / "last.ckpt", weights_only=True)
        assert saved["global_step"] == 1
