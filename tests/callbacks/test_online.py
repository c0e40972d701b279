"""Evaluation during training: it changes nothing of the training, survives kills, and chooses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir

from medclip.callbacks.online import OnlineEvaluation, scalars
from medclip.callbacks.throughput import Throughput
from medclip.config import CONF
from medclip.evaluate import evaluate
from medclip.train import train
from medclip.types import UserError

TINY = [
    "experiment=tiny",
    "model=tiny_vit",
    "model.architecture.vision_cfg.image_size=32",
    "model.architecture.vision_cfg.layers=1",
    "model.architecture.vision_cfg.width=64",
    "+model.architecture.vision_cfg.patch_dropout=0.25",  # what must be off while evaluating, and on afterwards
    "model.architecture.text_cfg.layers=1",
    "model.architecture.text_cfg.width=32",
    "model.architecture.text_cfg.context_length=16",
    "callbacks.checkpoint.every_n_steps=2",
    "data.batch_size=8",
    "data.workers=0",
    "data.sources=[{phantoms: {kind: xray, samples: 32, size: 64, seed: 0}}]",
    "epochs=2",
]
SET = "[{phantoms: {kind: xray, samples: 24, size: 64, seed: 9}}]"
ONLINE = [
    "eval=[phantom_xray,phantom_xray_retrieval]",
    f"evals.phantom_xray.data.sources={SET}",
    f"evals.phantom_xray_retrieval.data.sources={SET}",
    "callbacks.online.every_n_steps=3",
]
ALL = "callbacks=[default,stream,online,best_online,early_stopping]"
STOP = ["callbacks.early_stopping.monitor=eval/score", "callbacks.early_stopping.patience=50"]


def run(folder: Path, *words: str) -> pl.Trainer:
    torch.set_num_threads(1)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [*TINY, f"output={folder}", *words])
    return train(cfg)


def stream(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "stream-0.jsonl").read_text().splitlines()]


def metrics(folder: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv without what a clock says."""
    head, *lines = (folder / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(head.split(","), line.split(","), strict=True)) for line in lines]
    return [{k: v for k, v in row.items() if v and not k.startswith(("speed/", "memory/"))} for row in rows]


def evaluated(folder: Path) -> dict[int, float]:
    return {int(row["step"]): float(row["eval/score"]) for row in metrics(folder) if "eval/score" in row}


def saved(folder: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(folder, ALL, *ONLINE, *STOP)
    return folder


def test_losses_are_those_of_a_run_without_evaluations(whole: Path, tmp_path: Path) -> None:
    run(tmp_path / "plain", "callbacks=[default,stream]")
    assert stream(tmp_path / "plain") == stream(whole)
    ours, theirs = saved(whole)["state_dict"], saved(tmp_path / "plain")["state_dict"]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_it_comes_before_the_first_step_every_third_and_at_the_end(whole: Path) -> None:
    # Rows are numbered as Lightning numbers a validation after that step: from 0.
    assert list(evaluated(whole)) == [0, 2, 5, 7]
    assert len(stream(whole)) == 8


def test_the_last_one_is_what_medclip_evaluate_says(whole: Path, tmp_path: Path) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        words = [word for word in ONLINE if not word.startswith("callbacks")]
        words += [
            f"checkpoint={whole}/checkpoints/last.ckpt",
            f"output={tmp_path / 'report'}",
            "workers=0",
            "device=cpu",
        ]
        report = evaluate(compose("evaluate", [*words, "bootstrap.samples=100"]))
    last = next(row for row in reversed(metrics(whole)) if "eval/score" in row)
    for name, comparison in report.comparisons.items():
        for metric, value in comparison.any_result.metrics.items():
            assert float(last[f"eval/{name}/{metric}"]) == pytest.approx(value, abs=1e-6), (name, metric)


class Killed(Exception):
    """In place of a signal: nothing is saved after it."""


@pytest.mark.parametrize("where", ["evaluating", "after the evaluation", "after the checkpoint"])
def test_killed_and_resumed_is_the_uninterrupted_run(
    where: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Score of the best, patience, metrics and weights, wherever in step 6 (evaluated and saved) the run is killed."""
    folder = tmp_path / "run"
    real, start = OnlineEvaluation._evaluate, Throughput.on_train_batch_start

    def evaluate_and_die(self: Any, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == 6 and where == "evaluating":
            raise Killed
        real(self, trainer, *args, **kwargs)
        if trainer.global_step == 6 and where == "after the evaluation":
            raise Killed

    def start_and_die(self: Any, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 6 and where == "after the checkpoint":
            raise Killed
        start(self, trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(OnlineEvaluation, "_evaluate", evaluate_and_die)
        patch.setattr(Throughput, "on_train_batch_start", start_and_die)
        with pytest.raises(Killed):
            run(folder, ALL, *ONLINE, *STOP)
    assert saved(folder)["global_step"] == (6 if where == "after the checkpoint" else 4)
    run(folder, ALL, *ONLINE, *STOP, "resume=auto")
    assert stream(folder) == stream(whole)
    assert metrics(folder) == metrics(whole)
    for name in ("best", "last"):
        ours, theirs = saved(folder, name), saved(whole, name)
        assert ours["global_step"] == theirs["global_step"]
        assert all(torch.equal(ours["state_dict"][key], value) for key, value in theirs["state_dict"].items())
        for key, state in theirs["callbacks"].items():
            if key.startswith(("BestCheckpoint", "EarlyStop")):
                assert plain(ours["callbacks"][key]) == plain(state)


def plain(state: dict[str, Any]) -> dict[str, Any]:
    """Numbers alone: the paths differ."""
    return {k: float(v) for k, v in state.items() if isinstance(v, int | float | torch.Tensor)}


def test_the_best_checkpoint_is_that_of_the_best_evaluation(whole: Path) -> None:
    scores = evaluated(whole)
    del scores[0]  # the untrained model is no candidate
    assert saved(whole, "best")["global_step"] == max(scores, key=lambda row: scores[row]) + 1


def test_a_run_that_gets_no_better_ends_and_stays_ended(tmp_path: Path) -> None:
    """Next to no learning rate: the first evaluation stays the best, two more use up the patience."""
    words = [
        ALL,
        *ONLINE,
        "optim.lr=1e-30",
        "optim.weight_decay=0",
        "callbacks.online.every_n_steps=2",
        "callbacks.early_stopping.patience=2",
    ]
    words += ["callbacks.early_stopping.monitor=eval/phantom_xray/auroc", "epochs=9"]
    assert run(tmp_path / "run", *words).global_step == 6
    assert run(tmp_path / "run", *words, "resume=auto").global_step == 6
    assert saved(tmp_path / "run")["global_step"] == 6


def test_a_classifier_is_evaluated_as_its_validation_says(tmp_path: Path) -> None:
    """The same patients by two ways, `val/auroc` of the task and `eval/phantom_thorax/auroc`."""
    words = ["experiment=thorax", "model=vit_tiny", "callbacks=[default,best,online]", "eval=[phantom_thorax]"]
    words += [f"data.sources={SET}", f"data.val_sources={SET}", "data.batch_size=8", "data.workers=0", "epochs=1"]
    words += [f"evals.phantom_thorax.data.sources={SET}", "trainer=cpu", "task.lr_batch=null", "data.eval_resize=null"]
    words += ["data.labels={names: [pneumothorax, cardiomegaly], from: class, field: phantom.label, other: zeros}"]
    words += ["+evals.phantom_thorax.data.labels.other=zeros", "data.decode=exact", f"output={tmp_path}"]
    words += ["evals.phantom_thorax.data.labels.names=[pneumothorax,cardiomegaly]", "data.group=null"]
    words += ["~evals.phantom_thorax.data.labels.values", "evals.phantom_thorax.classes=null"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        trainer = train(compose("train", words))
    metrics = trainer.callback_metrics
    assert 0 < float(metrics["val/auroc"]) < 1
    assert float(metrics["eval/phantom_thorax/auroc"]) == pytest.approx(float(metrics["val/auroc"]), abs=1e-6)


@pytest.mark.slow
def test_two_ranks_decide_alike(tmp_path: Path) -> None:
    """Rank 0 evaluates: two gloo ranks end after the same step, with the losses of two that evaluate nothing."""
    words = [w for w in TINY if not w.startswith("epochs")] + ["trainer=ddp", "trainer.accelerator=cpu", "epochs=4"]
    words += ["trainer.devices=2", "trainer.precision=32-true", "optim.lr=1e-30", "optim.weight_decay=0"]
    stops = [*STOP[:1], "callbacks.early_stopping.patience=1", "callbacks.early_stopping.min_delta=0.9"]
    for name, more in (("plain", ["callbacks=[default,stream]"]), ("online", [ALL, *ONLINE, *stops])):
        command = [sys.executable, "-m", "medclip.cli", "train", *words, *more, f"output={tmp_path / name}"]
        subprocess.run(command, check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert saved(tmp_path / "online")["global_step"] == 6  # no better after the second of its evaluations
    for rank in (0, 1):
        plain, online = (
            (tmp_path / name / f"stream-{rank}.jsonl").read_text().splitlines() for name in ("plain", "online")
        )
        assert len(online) == 6 and plain[:6] == online


class Outcome:
    def __init__(self, headline: tuple[str, ...], less: frozenset[str] = frozenset(), **metrics: float) -> None:
        self.headline, self.lower_is_better, self.details = headline, less, None
        self.metrics = {name.replace("__", ":"): value for name, value in metrics.items()}


def test_score_is_the_mean_of_the_headlines_means() -> None:
    nan = float("nan")
    results = {
        "a": Outcome(("x", "y"), x=0.2, y=0.4, z=0.9),
        "b": Outcome(("x", "rank", "gone"), frozenset({"rank"}), x=0.5, rank=7.0, gone=nan, x__nodule=0.1),
        "c": Outcome(("gone",), gone=nan),
    }
    found = scalars(results)
    assert found["eval/score"] == pytest.approx((0.3 + 0.5) / 2)
    assert found["eval/b/rank"] == 7 and "eval/b/x:nodule" not in found
    assert "eval/score" not in scalars({"c": results["c"]})


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["callbacks=[default,online]"], r"nothing to evaluate.*eval=\[zeroshot\]"),
        (["callbacks=[default,online]", "eval=[phantom_xray]"], "evals.phantom_xray.data.sources is missing"),
        (["callbacks=[default,best_online]"], r"callbacks\.best\.monitor=eval/score needs evaluations"),
        ([ALL, *ONLINE, *STOP, "callbacks.best.monitor=eval/xray/auroc"], "names no evaluation.*phantom_xray"),
        ([ALL, *ONLINE, *STOP, "callbacks.best.monitor=eval/phantom_xray/f1"], "no metric.*phantom_xray/macro_f1"),
        ([ALL, *ONLINE, *STOP, "callbacks.online.every_n_steps=0"], "every_n_steps is 0"),
    ],
)
def test_bad_settings_are_one_line(words: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        run(tmp_path / "run", *words)


def test_passes_and_limit(tmp_path: Path) -> None:
    """After each of the two passes; on as many samples as the limit says, unless the evaluation says another."""
    words = ["callbacks=[default,online]", *ONLINE, "callbacks.online.every_n_steps=null"]
    words += ["callbacks.online.evals.limit=10", "evals.phantom_xray_retrieval.data.limit=7"]
    trainer = run(tmp_path / "run", *words, "callbacks.online.at_start=false")
    assert list(evaluated(tmp_path / "run")) == [3, 7]
    online = next(c for c in trainer.callbacks if isinstance(c, OnlineEvaluation))  # pyright: ignore
    assert {name: len(evaluation.data) for name, evaluation in online.evals.items()} == {
        "phantom_xray": 10,
        "phantom_xray_retrieval": 7,
    }


def test_locked_parts_stay_in_evaluation_mode(tmp_path: Path) -> None:
    """Modes are put back one by one: what training keeps in evaluation mode is not switched on."""
    modes: list[list[bool]] = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: pl.LightningModule, *args: Any) -> None:
            modes.append([module.training for module in pl_module.modules()])

    class Task(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Dropout(), torch.nn.Linear(2, 1))

        def on_train_start(self) -> None:
            self.model[0].eval()

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.model(batch).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    seen: list[bool] = []

    def evaluating(model: torch.nn.Module, evals: Any) -> dict[str, Outcome]:
        seen.append(any(module.training for module in model.modules()))
        return {"a": Outcome(("x",), x=torch.rand(()).item())}  # draws, too

    online = OnlineEvaluation({"a": None}, evaluating, every_n_steps=1)  # pyright: ignore
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, callbacks=[online, Watch()], default_root_dir=tmp_path
    )
    trainer.fit(Task(), torch.utils.data.DataLoader(torch.randn(6, 2), batch_size=2))
    assert len(modes) == 3 and modes[0] == modes[1] == modes[2] == [True, True, False, True, True]
    assert seen == [False] * 4
