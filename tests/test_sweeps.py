"""The sweeps of conf/sweep call `medclip train` with settings that exist, and log what they search by."""

from __future__ import annotations

import tomllib
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from medclip.config import CONF
from medclip.train import train

sweeps = pytest.importorskip("wandb.sdk.launch.sweeps.utils")

FILES = sorted((CONF / "sweep").glob("*.yaml"))
PHANTOMS = "[{phantoms: {kind: xray, samples: 16, size: 64, seed: %d}}]"
TINY = [
    "model=tiny_vit",
    "model.pretrained=null",
    "model.architecture.vision_cfg.layers=1",
    "model.architecture.text_cfg.layers=1",
    "trainer=cpu",
    "data.batch_size=4",
    "data.workers=0",
    f"data.sources={PHANTOMS % 0}",
    f"evals.retrieval.data={{sources: {PHANTOMS % 1}, captions: [phantom.captions]}}",
]


def commands(sweep: dict[str, Any]) -> list[list[str]]:
    """As W&B's agent makes them: of a grid all, of a range its two ends."""
    names = list(sweep["parameters"])
    choices = [p["values"] if "values" in p else [p["min"], p["max"]] for p in sweep["parameters"].values()]
    found = []
    for values in product(*choices):
        made = sweeps.create_sweep_command_args({"args": {n: {"value": v} for n, v in zip(names, values, strict=True)}})
        words: list[str] = []
        for chunk in sweeps.create_sweep_command(list(sweep["command"])):
            name = chunk[2:-1] if chunk.startswith("${") else None
            words += made[name] if name in made else [{"env": "env", "program": sweep["program"]}.get(name, chunk)]
        found.append(words)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_command_is_one_of_medclips(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    sweep = yaml.safe_load(path.read_text())
    assert sweep["method"] in ("bayes", "grid", "random")
    scripts = tomllib.loads((CONF.parent / "pyproject.toml").read_text())["project"]["scripts"]
    for words in commands(sweep):
        assert words[0] == "env" and words[1] in scripts and words[2] == "train"
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("train", words[3:])
        assert OmegaConf.to_container(cfg, resolve=False)
        assert cfg.output == "runs/sweep/abc123"
        given = dict(word.split("=", 1) for word in words[3:])
        for name in sweep["parameters"]:
            if "." in name:  # groups are choices, not values
                assert OmegaConf.select(cfg, name) == pytest.approx(float(given[name]))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_run_logs_what_is_searched_by(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    sweep = yaml.safe_load(path.read_text())
    words = [word for word in commands(sweep)[-1][3:] if not word.startswith(("data", "evals", "model", "logger"))]
    if "adapt=[lora]" in words:
        pytest.importorskip("peft")
    words += [*TINY, f"output={tmp_path / 'run'}", "max_steps=2"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        trainer = train(compose("train", words))
    assert trainer.global_step == 2 and sweep["metric"]["name"] in trainer.callback_metrics
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").is_file()
