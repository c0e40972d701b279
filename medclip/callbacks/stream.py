"""Which samples each step saw, and what it made of them: the proof that a resumed run is the uninterrupted one.

`callbacks=[default,stream]` writes `stream-RANK.jsonl` into the run folder: one line a batch with the epoch, the keys
in their order, digests of pixels and tokens, and the loss to the last bit (`float.hex`). A resumed run drops the lines
of the batches that it repeats, so two folders can be compared with `diff`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytorch_lightning as pl


class StreamLog(pl.Callback):
    """Appends one line per training batch to `output/stream-RANK.jsonl`."""

    def __init__(self, output: str) -> None:
        self.output = Path(output)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.path = self.output / f"stream-{trainer.global_rank}.jsonl"
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        lines = self.path.read_text().splitlines()[:done] if self.path.is_file() else []
        self.path.write_text("".join(f"{line}\n" for line in lines))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        row = {
            "batch": batch_idx,
            "epoch": batch["epoch"],
            "keys": batch["key"],
            "image": _digest(batch["image"]),
            "text": _digest(batch["text"]) if "text" in batch else None,
            "loss": float(outputs["loss"]).hex(),
        }
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _digest(tensor: Any) -> str:
    return hashlib.sha256(tensor.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]
