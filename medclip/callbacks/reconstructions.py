"""What a masked autoencoder draws, every few epochs: a sheet of pictures in the run folder, and in W&B.

Each row is an image, what the encoder saw of it, all that the decoder drew, and the drawing with the seen patches in
their places. Where patches were seen the drawing is noise: no loss has taught it those. The images are the first of the
validation set, or of the run where there is none, and their masks are the same on every sheet, so that two sheets
differ by what was learnt.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image, ImageDraw, ImageFont
from pytorch_lightning.loggers import WandbLogger
from torch import Tensor

TITLES = ("image", "seen", "drawn", "drawn, seen kept")
GAP, HEAD = 6, 22  # pixels


class Reconstructions(pl.Callback):
    """Writes `output/reconstructions/epoch-0001.png`; the model draws itself: `model.draw(batch, normalised=…)`.

    Args:
        output: run folder.
        every: epochs between two sheets; there is one more at the end of the run.
        images: rows of a sheet.
        normalised: the loss normalises pixels patch by patch.
        seed: of the masks.
    """

    def __init__(self, output: str, every: int = 10, images: int = 8, normalised: bool = False, seed: int = 0) -> None:
        self.folder = Path(output) / "reconstructions"
        self.every = every
        self.images = images
        self.normalised = normalised
        self.seed = seed
        self._epoch: int | None = None
        self._shown: dict[str, Tensor] = {}
        self._validated = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Here, not at the end of the epoch before: the validation after that has brought its images by now.
        if self._epoch is not None and batch["epoch"] > self._epoch and batch["epoch"] % self.every == 0:
            self._draw(trainer, pl_module, batch["epoch"])
        self._epoch = batch["epoch"]
        if not self._shown:
            self._shown = self._first_rows(batch)

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not self._validated and batch["key"]:
            self._shown, self._validated = self._first_rows(batch), True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._epoch is not None and not trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            self._draw(trainer, pl_module, self._epoch + 1)

    def _first_rows(self, batch: Any) -> dict[str, Tensor]:
        n = min(self.images, len(batch["key"]))
        return {key: batch[key][:n].clone() for key in ("image", "mean", "std") if n and key in batch}

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int) -> None:
        if not self._shown or not trainer.is_global_zero:
            return
        batch = {key: value.to(pl_module.device) for key, value in self._shown.items()}
        devices = [pl_module.device] if pl_module.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.seed)
            drawings = pl_module.model.draw(batch, normalised=self.normalised)  # pyright: ignore
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"epoch-{epoch:04d}.png"
        sheet(drawings).save(path)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("reconstructions", [str(path)], caption=[f"epoch {epoch}"])


def sheet(columns: Sequence[Tensor]) -> Image.Image:
    """Columns of float pictures (n, 3, h, w) on a 0..1 scale, titled, side by side."""
    _, _, h, w = columns[0].shape
    n = len(columns[0])
    page = Image.new("RGB", (len(columns) * (w + GAP) + GAP, HEAD + n * (h + GAP)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for column, (title, pictures) in enumerate(zip(TITLES, columns, strict=False)):
        left = GAP + column * (w + GAP)
        pen.text((left, 3), title, fill="black", font=font)
        pixels = (pictures.float().cpu() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        for row in range(n):
            page.paste(Image.fromarray(np.ascontiguousarray(pixels[row])), (left, HEAD + row * (h + GAP)))
    return page
