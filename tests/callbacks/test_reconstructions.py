"""Sheets of reconstructions: when, of which images, and that each picture is where its title says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pytorch_lightning.loggers import WandbLogger

from medclip.callbacks.reconstructions import GAP, HEAD, Reconstructions, sheet
from tests.tasks.rows import Stream, batch, mae_task, trainer


def picture(path: Path, row: int, column: int, size: int = 32) -> np.ndarray:
    top, left = HEAD + row * (size + GAP), GAP + column * (size + GAP)
    return np.asarray(Image.open(path))[top : top + size, left : left + size]


def test_a_sheet_holds_each_picture_in_its_place():
    columns = [torch.full((2, 3, 32, 32), value) for value in (0.0, 0.25, 0.5, 1.0)]
    columns[1][1, 0] = 1.0
    page = np.asarray(sheet(columns))
    assert page.shape == (HEAD + 2 * (32 + GAP), 4 * (32 + GAP) + GAP, 3)
    for column, value in enumerate((0, 64, 128, 255)):
        left = GAP + column * (32 + GAP)
        assert (page[HEAD : HEAD + 32, left : left + 32] == value).all()
    below = page[HEAD + 32 + GAP : HEAD + 64 + GAP, 2 * GAP + 32 : 2 * GAP + 64]
    assert (below[..., 0] == 255).all() and (below[..., 1:] == 64).all()


def test_sheets_come_every_few_epochs_and_at_the_end(tmp_path: Path):
    """Nine batches are three epochs; the images are the first of the run, the masks the same on every sheet."""
    batches = [batch(number) for number in range(9)]
    trainer(tmp_path, Reconstructions(str(tmp_path), every=2, images=3)).fit(mae_task(), Stream(batches))
    folder = tmp_path / "reconstructions"
    assert sorted(path.name for path in folder.iterdir()) == ["epoch-0002.png", "epoch-0003.png"]
    first, last = folder / "epoch-0002.png", folder / "epoch-0003.png"
    for row in range(3):
        original = batches[0]["image"][row].permute(1, 2, 0).numpy()
        for path in (first, last):
            assert np.abs(picture(path, row, 0).astype(int) - original).max() <= 1
        assert (picture(first, row, 1) == picture(last, row, 1)).all()
        assert (picture(first, row, 2) != picture(last, row, 2)).any()  # something was learnt in between


def test_images_of_the_validation_set_come_first(tmp_path: Path):
    val = [batch(100)]
    sheets = Reconstructions(str(tmp_path), images=2)
    trainer(tmp_path, sheets, val_check_interval=2).fit(mae_task(), Stream([batch(number) for number in range(3)], val))
    found = picture(tmp_path / "reconstructions" / "epoch-0001.png", 0, 0).astype(int)
    assert np.abs(found - val[0]["image"][0].permute(1, 2, 0).numpy()).max() <= 1


def test_drawing_changes_nothing_of_the_run(tmp_path: Path):
    batches = [batch(number) for number in range(6)]
    plain, drawn = mae_task(), mae_task()
    trainer(tmp_path).fit(plain, Stream(batches))
    trainer(tmp_path, Reconstructions(str(tmp_path), every=1)).fit(drawn, Stream(batches))
    for ours, theirs in zip(drawn.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_wandb_logger_gets_the_sheet(tmp_path: Path, monkeypatch):
    sent: list[tuple[Any, ...]] = []
    monkeypatch.setattr(WandbLogger, "log_image", lambda self, key, images, **rest: sent.append((key, images)))
    logger = WandbLogger(save_dir=str(tmp_path), offline=True, id="abc")
    trainer(tmp_path, Reconstructions(str(tmp_path)), logger=logger).fit(mae_task(), Stream([batch(0)]))
    assert sent == [("reconstructions", [str(tmp_path / "reconstructions" / "epoch-0001.png")])]
    logger.experiment.finish()
