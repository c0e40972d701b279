"""Training step: a plain torch loop's time over ours, on the same batches, with the same losses.

    scripts/bench/step.py [--quick]

Ours is what `medclip train model=tiny trainer=cpu` runs: `ClipTask` under Lightning's Trainer with the default
callbacks and metrics.csv. The peer is the loop that one would write by hand around the same towers: encode, cross
entropy both ways, backward, clip the gradients, fused AdamW, schedule, clamp the scale, and no logging whatever. Both
start from the same weights and go through the same batches in memory (float32, normalised, one thread); after the last
step the losses must be equal to the bit. Time is taken between two requests for a batch, the same number of steps apart
on both sides, so that neither set-up nor the checkpoint at a run's end counts.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import math
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence

import hydra
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from _timing import Cost, Stopwatch, arguments, interleave, report
from torch import nn

from medclip.config import CONF, build
from medclip.models.clip import Clip
from medclip.optim.adamw import adamw
from medclip.optim.schedule import warmup_cosine
from medclip.types import Batch

BATCH = 48
WARM_UP = 2  # steps that do not count: in the first, buffers and the optimiser's state are made
RATE = 1e-4


class Batches:
    """The same batches for whoever iterates, and the cost of the `steps` steps after `WARM_UP`."""

    def __init__(self, batches: Sequence[Batch], steps: int) -> None:
        self.batches = batches
        self.steps = steps
        self.cost: Cost | None = None

    def __len__(self) -> int:
        return WARM_UP + self.steps + 1

    def __iter__(self) -> Iterator[Batch]:
        watch = Stopwatch()
        for number in range(len(self)):
            if number == WARM_UP:
                watch = Stopwatch()
            elif number == WARM_UP + self.steps:
                self.cost = watch.read(self.steps)
            yield self.batches[number % len(self.batches)]


def make_batches(model: Clip, count: int = 4) -> list[Batch]:
    """`count` batches of `BATCH` random pairs, as the model eats them."""
    generator = torch.Generator().manual_seed(0)
    height, width = model.preprocess.size
    batches = []
    for number in range(count):
        words = torch.randint(0, 1000, (BATCH, 20), generator=generator).tolist()
        batches.append(
            Batch(
                image=torch.randn(BATCH, 3, height, width, generator=generator),
                text=model.tokenizer([" ".join(map(str, row)) for row in words]),
                key=[f"{number}-{row}" for row in range(BATCH)],
                skipped=0,
            )
        )
    return batches


def ours(model: Clip, batches: Batches) -> float:
    """Train as `medclip train` does; returns the last step's loss."""
    with tempfile.TemporaryDirectory() as output, hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("train", ["model=tiny", "trainer=cpu", f"output={output}", f"optim.lr={RATE}"])
        task = build(cfg.task, model=model)
        callbacks = list(build(cfg.callbacks).values())
        trainer: pl.Trainer = build(cfg.trainer, callbacks=callbacks, logger=list(build(cfg.logger).values()))
        trainer.fit(task, train_dataloaders=batches)
        return float(trainer.callback_metrics["train/loss"])


def plain(model: Clip, batches: Batches) -> float:
    """The loop by hand; returns the last step's loss."""
    net = model.net.train()
    optimizer = adamw(net.named_parameters(), lr=RATE)
    schedule = warmup_cosine(optimizer, len(batches))
    target = torch.arange(BATCH)
    loss = torch.tensor(0.0)
    for batch in batches:
        assert "image" in batch and "text" in batch
        image = F.normalize(net.encode_image(batch["image"]), dim=-1)
        text = F.normalize(net.encode_text(batch["text"]), dim=-1)
        logits = net.logit_scale.exp() * image @ text.T
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()  # here, as Lightning does: freed before the towers ran, their memory would be given away
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            net.logit_scale.clamp_(max=math.log(100))
    return float(loss)


def keep_freed_memory() -> None:
    """Have glibc reuse what is freed: how often it asks for fresh pages varies by more than what is compared here."""
    if sys.platform == "linux":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its greatest
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def main() -> None:
    args = arguments(__doc__)
    torch.set_num_threads(1)
    keep_freed_memory()
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("train", ["model=tiny"]).model
    steps = 5 if args.quick else 20
    data = make_batches(build(config))
    losses: list[tuple[str, float]] = []

    def run(train: Callable[[Clip, Batches], float]) -> Cost:
        torch.manual_seed(0)
        model = build(config)
        batches = Batches(data, steps)
        with contextlib.redirect_stderr(io.StringIO()):  # the progress line
            losses.append((train.__name__, train(model, batches)))
        assert batches.cost is not None
        return batches.cost

    pairs = interleave(lambda: run(ours), lambda: run(plain), runs=5)
    if len({loss for _, loss in losses}) > 1:
        sys.exit(f"step: the losses differ, so the speeds do not compare: {losses}")
    print(f"batch {BATCH}; last loss on both sides, in every run: {losses[0][1]}")
    report("step", pairs, unit="step", peer="plain-torch-loop")


if __name__ == "__main__":
    main()
