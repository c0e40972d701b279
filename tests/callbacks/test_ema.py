"""The moving average: by hand from every step's weights, in every checkpoint, and to the bit after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir

from medclip.callbacks.ema import Ema
from medclip.config import CONF
from medclip.models.load import load_clip
from medclip.train import train
from medclip.types import UserError

# A convolutional tower, whose batch norms have statistics to average, with a locked text tower.
WORDS = [
    "experiment=tiny",
    "adapt=[lock_text]",
    "model.architecture.vision_cfg.image_size=64",
    "model.architecture.text_cfg.layers=1",
    "data.sources=[{phantoms: {kind: xray, samples: 20, size: 64}}]",
    "data.val_sources=[{phantoms: {kind: xray, samples: 8, size: 64, seed: 1}}]",
    "data.batch_size=8",
    "data.workers=0",
    "epochs=2",
    "callbacks=[default,ema,best]",
    "callbacks.ema.decay=0.6",
    "callbacks.best.monitor=val/loss",
    "callbacks.best.mode=min",
    "callbacks.checkpoint.every_n_steps=2",
]
SPY = "+callbacks.spy._target_=tests.callbacks.test_ema.Spy"


class Spy(pl.Callback):
    """Weights after each step, and those that a validation sees."""

    steps: list[dict[str, torch.Tensor]] = []  # noqa: RUF012
    shown: list[dict[str, torch.Tensor]] = []  # noqa: RUF012
    dies: int | None = None

    @staticmethod
    def state(module: pl.LightningModule) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in module.state_dict().items()}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        Spy.steps, Spy.shown = [self.state(module)], []

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        self.steps.append(self.state(module))

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, number: int) -> None:
        if number == self.dies:
            raise SystemExit

    def on_validation_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.shown.append(self.state(module))


def run(*words: str, dies: int | None = None) -> pl.Trainer:
    torch.set_num_threads(1)
    Spy.dies = dies
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return train(compose("train", [*WORDS, SPY, *words]))


def by_hand(steps: list[dict[str, torch.Tensor]], decay: float) -> dict[str, torch.Tensor]:
    """In float64, from the weights at the start and after each step."""
    average = {name: value.double() for name, value in steps[0].items() if value.is_floating_point()}
    for t, weights in enumerate(steps[1:], 1):
        d = min(decay, (1 + t) / (10 + t))
        average = {name: d * value + (1 - d) * weights[name].double() for name, value in average.items()}
    return average


def read(folder: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ema")
    trainer = run(f"output={folder}")
    assert trainer.lightning_module is not None
    torch.save({"steps": Spy.steps, "shown": Spy.shown, "end": Spy.state(trainer.lightning_module)}, folder / "spy.pt")
    return folder


def test_checkpoints_validation_and_the_end_hold_the_average(whole: Path):
    spy, last = torch.load(whole / "spy.pt", weights_only=True), read(whole)
    assert len(spy["steps"]) == 7 and len(spy["shown"]) == 2
    expected = by_hand(spy["steps"], 0.6)
    moved = 0
    for name, average in expected.items():
        torch.testing.assert_close(last["state_dict"][name].double(), average, atol=1e-6, rtol=1e-5, msg=name)
        assert torch.equal(spy["end"][name], last["state_dict"][name])
        moved += bool((average - spy["steps"][-1][name].double()).abs().max() > 1e-5)
    assert moved > 20  # the average is not simply the last weights
    statistics = [name for name in expected if name.endswith("running_mean")]
    assert statistics and all((expected[name] - spy["steps"][-1][name]).any() for name in statistics)
    # Halfway: what the first validation saw is the average after three steps, and training went on from the weights.
    halfway = by_hand(spy["steps"][:4], 0.6)
    for name, average in halfway.items():
        torch.testing.assert_close(spy["shown"][0][name].double(), average, atol=1e-6, rtol=1e-5, msg=name)
    for name, value in last["ema"].items():
        assert torch.equal(value, spy["steps"][-1][name]), name
    best = read(whole, "best")
    step = best["global_step"]
    for name, average in by_hand(spy["steps"][: step + 1], 0.6).items():
        torch.testing.assert_close(best["state_dict"][name].double(), average, atol=1e-6, rtol=1e-5, msg=name)


def test_what_is_loaded_is_the_average_and_what_is_locked_is_as_it_was(whole: Path):
    spy = torch.load(whole / "spy.pt", weights_only=True)
    clip = load_clip(pretrained=str(whole / "checkpoints/last.ckpt"))
    for name, value in clip.net.state_dict().items():
        assert torch.equal(value, read(whole)["state_dict"][f"model.net.{name}"])
        if name.startswith(("transformer.", "token_embedding.")):
            assert torch.equal(value, spy["steps"][0][f"model.net.{name}"])
            assert f"model.net.{name}" not in read(whole)["ema"]


@pytest.mark.parametrize("dies", [3, 5])
def test_killed_and_resumed_is_the_same_run(whole: Path, tmp_path: Path, dies: int):
    with pytest.raises(SystemExit):
        run(f"output={tmp_path}", dies=dies)
    run(f"output={tmp_path}", "resume=auto")
    for name in ("last", "best"):
        one, other = read(whole, name), read(tmp_path, name)
        assert one["global_step"] == other["global_step"]
        for part in ("state_dict", "ema"):
            assert one[part].keys() == other[part].keys()
            assert all(torch.equal(one[part][key], other[part][key]) for key in one[part]), part


def test_a_run_without_average_can_go_on_with_one(tmp_path: Path):
    run(f"output={tmp_path}", "~callbacks.ema", "max_steps=2")
    before = read(tmp_path)["state_dict"]
    run(f"output={tmp_path}", "resume=auto")
    after = read(tmp_path)
    first = Spy.steps[0]
    assert all(torch.equal(first[name], before[name]) for name in before) and len(Spy.steps) == 5
    assert "ema" in after and any((after["ema"][k] != after["state_dict"][k]).any() for k in after["ema"])


def test_evaluations_see_the_average_and_what_is_saved_amid_one_is_the_same():
    task = pl.LightningModule()
    task.weight = torch.nn.Parameter(torch.zeros(2))
    trainer = type("T", (), {"global_step": 0, "strategy": None})()
    ema = Ema(0.5)
    ema.on_train_start(trainer, task)
    task.weight.data.fill_(11.0)
    trainer.global_step = 1
    ema.on_train_batch_end(trainer, task, None, None, 0)  # 0 + (1 - 2 / 11) * 11 = 9

    def saved() -> tuple[float, float]:
        checkpoint = {"state_dict": task.state_dict()}
        ema.on_save_checkpoint(trainer, task, checkpoint)
        return checkpoint["state_dict"]["weight"][0].item(), checkpoint["ema"]["weight"][0].item()

    assert saved() == (pytest.approx(9.0), 11.0)
    ema.evaluating(trainer, task)
    assert task.weight[0].item() == pytest.approx(9.0) and saved() == (pytest.approx(9.0), 11.0)
    ema.evaluated(trainer, task, {}, {}, started=True)
    assert task.weight[0].item() == 11.0


def test_weights_in_bfloat16_have_an_average_that_moves():
    """0.999 * 1 + 0.001 * 2 is 1.001, which bfloat16 rounds to 1."""
    task = pl.LightningModule()
    task.weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    trainer = type("T", (), {"global_step": 10**6})()
    ema = Ema(0.999)
    ema.on_train_start(trainer, task)
    task.weight.data.fill_(2.0)
    for _ in range(100):
        trainer.global_step += 1
        ema.on_train_batch_end(trainer, task, None, None, 0)
    torch.testing.assert_close(ema.average["weight"], torch.full((3,), 2 - 0.999**100))


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_out_of_range(decay: float):
    with pytest.raises(UserError, match=r"callbacks\.ema\.decay"):
        Ema(decay)
