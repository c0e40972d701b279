"""The gradient's norm among the metrics: before clipping, with or without, and only where it is shown if without."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir

from medclip.callbacks.metrics import MetricsCsv
from medclip.config import CONF, build

WORDS = [
    "experiment=tiny",
    "model=tiny_vit",
    "model.architecture.vision_cfg.image_size=32",
    "model.architecture.vision_cfg.layers=1",
    "model.architecture.text_cfg.layers=1",
    "callbacks=none",
    "data.batch_size=4",
    "data.workers=0",
    "data.sources=[{phantoms: {kind: xray, samples: 16, size: 64, seed: 0}}]",
]


class ByHand(pl.Callback):
    """Lightning calls it before it clips."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: pl.LightningModule, optimizer: Any) -> None:
        squares = [p.grad.double().square().sum() for p in pl_module.parameters() if p.grad is not None]
        self.norms.append(float(torch.stack(squares).sum().sqrt()))


@pytest.mark.parametrize("clip", ["1.0", "1e9", "null"])
def test_it_is_that_of_all_gradients_before_clipping(
    clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        words = [f"trainer.gradient_clip_val={clip}", "trainer.log_every_n_steps=2", f"output={tmp_path}"]
        cfg = compose("train", [*WORDS, *words])
    passes: list[int] = []  # over all gradients, beside clipping's own
    norm = torch.nn.utils.get_total_norm
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda grads: (passes.append(len(grads)), norm(grads))[1])
    pl.seed_everything(0, verbose=False)
    hand, logger = ByHand(), MetricsCsv(str(tmp_path))
    trainer = build(cfg.trainer, callbacks=[hand], logger=logger)
    trainer.fit(build(cfg.task), datamodule=build(cfg.data))
    with logger.path.open() as file:
        logged = {int(row["step"]): float(row["train/grad_norm"]) for row in csv.DictReader(file)}
    assert min(hand.norms) > 1
    assert logged == pytest.approx({1: hand.norms[1], 3: hand.norms[3]}, rel=1e-5)
    assert len(passes) == (2 if clip == "null" else 0)
