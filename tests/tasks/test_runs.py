"""`experiment=mae_cxr` and then `experiment=thorax` as users run them, on generated X-rays; killed and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir

from medclip.config import CONF
from medclip.models.any import load_any
from medclip.models.vit import Classifier
from medclip.train import train
from medclip.types import UserError

LABELS = "data.labels={names: [pneumothorax, cardiomegaly], from: class, field: phantom.label, other: zeros}"
SMALL = [
    "model.dim=32",
    "model.heads=2",
    "model.depth=2",
    "trainer=cpu",
    "data=pairs",
    "data.sources=[{phantoms: {kind: xray, samples: 20, size: 64}, statistics: {mean: 0.5, std: 0.25}}]",
    "data.val_sources=[{phantoms: {kind: xray, samples: 12, size: 64, seed: 1}}]",
    "data.batch_size=8",
    "data.workers=0",
    "epochs=2",
    "task.lr_batch=null",
    "optim.lr=1e-3",
    "callbacks.checkpoint.every_n_steps=2",
]
MAE = ["experiment=mae_cxr", "model=mae_tiny", *SMALL, "callbacks=[default,reconstructions,stream]"]
THORAX = ["experiment=thorax", "model=vit_tiny", *SMALL, LABELS, "callbacks=[default,best,stream]"]


class Killed(pl.Callback):
    """Ends the process's work amid the run's second epoch, saving nothing."""

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: dict, number: int) -> None:
        if number == 4:
            raise SystemExit


def run(*words: str) -> pl.Trainer:
    torch.set_num_threads(1)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return train(compose("train", list(words)))


def stream(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "stream-0.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("words", [MAE, THORAX], ids=["mae_cxr", "thorax"])
def test_killed_in_mid_epoch_and_resumed_is_the_same_run(words: list[str], tmp_path: Path) -> None:
    """The same pixels after crop, flip and RandAugment, the same masks and drop path, the same loss to the bit."""
    run(*words, f"output={tmp_path}/whole")
    killed = [*words, f"output={tmp_path}/killed"]
    with pytest.raises(SystemExit):
        run(*killed, "+callbacks.die._target_=tests.tasks.test_runs.Killed")
    assert len(stream(tmp_path / "killed")) == 4
    run(*killed, "resume=auto")
    whole, again = stream(tmp_path / "whole"), stream(tmp_path / "killed")
    assert len(whole) == 6 and [row["epoch"] for row in whole] == [0, 0, 0, 1, 1, 1]
    assert whole == again
    weights = [torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("whole", "killed")]
    first, second = (content["state_dict"] for content in weights)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_from_pretraining_to_a_classifier_that_can_be_evaluated(tmp_path: Path) -> None:
    run(*MAE, f"output={tmp_path}/mae")
    assert [path.name for path in (tmp_path / "mae/reconstructions").iterdir()] == ["epoch-0002.png"]
    made = run(*THORAX, f"output={tmp_path}/thorax", f"model.init={tmp_path}/mae/checkpoints/last.ckpt")
    assert {"val/auroc", "val/auroc/pneumothorax", "val/loss", "train/bce"} <= made.callback_metrics.keys()
    saved = torch.load(tmp_path / "thorax/checkpoints/best.ckpt", weights_only=True)
    assert saved["medclip"]["classes"] == ["pneumothorax", "cardiomegaly"]
    assert isinstance(load_any(pretrained=f"{tmp_path}/thorax/checkpoints/best.ckpt"), Classifier)
    # Validation came once an epoch, and the better of the two is best.ckpt.
    metrics = (tmp_path / "thorax/metrics.csv").read_text().splitlines()
    column = metrics[0].split(",").index("val/auroc")
    scores = {int(row.split(",")[0]): float(row.split(",")[column]) for row in metrics[1:] if row.split(",")[column]}
    assert len(scores) == 2
    assert saved["global_step"] == max(scores, key=lambda step: (scores[step], -step)) + 1


def test_missing_labels_and_validation_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no classes.*data\.labels"):
        run(*THORAX, f"output={tmp_path}/a", "data.labels=null")
    with pytest.raises(UserError, match=r"data\.val_sources is empty"):
        run(*THORAX, f"output={tmp_path}/b", "data.val_sources=[]")
