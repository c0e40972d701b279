"""Time of MEVF's training steps (bilinear attention, CLIP and auto-encoder, batch 32), a loop's as published over ours.

    scripts/bench/vqa.py [--quick]

Ours is what `medclip train experiment=medvqa_mevf trainer=cpu data.workers=0` runs, reading included. The peer is
MEVF's training step with PubMedCLIP in it (arXiv:1909.11867, 2112.13906), written anew in the manner of the published
code: finished images are held as float arrays from the start and stacked for each batch, CLIP (float32, features not
made unit-norm) and auto-encoder are trained, each glimpse is three products a channel, all gradients are copied to one
vector, clipped and copied back, Adamax, and the batch's score is counted. Both hold the same weights and go through the
same questions on one thread. Without dropout the losses of the first steps must agree to 1e-5. The published code also
has torch look for anomalies in every step, which is much slower; here it does not.

`vqa`: all is trained. `vqa_cached`: ours keeps CLIP and auto-encoder as they are and remembers their features, after a
pass over the images that does not count; the peer is the same, for it has nothing of the kind.

The CLIP has the size of a ViT-B/32, with --quick of a ViT-S/32.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from _timing import Cost, Stopwatch, arguments, interleave, report
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

sys.path.remove(str(Path(__file__).resolve().parent))  # where slides.py is a benchmark, and not the package
from medclip.config import CONF, build
from medclip.data.sources import open_sources
from medclip.models.vqa import VqaModel

BATCH = 32
ANSWERS = 431  # about as many as VQA-RAD has
QUESTIONS = 128  # four about each of 32 images
PASS = QUESTIONS // BATCH  # steps; those of the first pass do not count
PEER = "MEVF-restated"
DRAWN = 0.001 / BATCH  # the published trainer divides it by the batch
TEXT = {"context_length": 16, "vocab_size": 64, "layers": 1, "width": 64, "heads": 1}
TOWERS = {
    True: {"embed_dim": 512, "vision_cfg": {"image_size": 224, "patch_size": 32, "layers": 12, "width": 384}},
    False: {"embed_dim": 512, "vision_cfg": {"image_size": 224, "patch_size": 32, "layers": 12, "width": 768}},
}


def write_questions(folder: Path) -> Path:
    """Generated questions as a table and JPEGs of about VQA-RAD's size."""
    recipe = {"kind": "questions", "samples": QUESTIONS, "size": 512, "seed": 0}
    source: Any = open_sources([{"phantoms": recipe}])[0]
    rows = []
    for i in range(len(source)):
        about = source.about(i)
        name = f"{about['image']}.jpg"
        if not (folder / name).exists():
            (folder / name).write_bytes(source.read(i).image)
        rows.append({"image": name, "question": about["question"], "answer": about["answer"]})
    table = folder / "questions.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return table


class Experiment:
    """One configuration of ours, built anew for each run from the same seed."""

    def __init__(self, table: Path, tower: dict[str, Any], *, frozen: bool, steps: int) -> None:
        questions = "{question: question, answer: answer}"
        source = f"{{table: {table}, questions: {questions}}}"
        parts = [f"model.visual.parts.{i}.frozen={str(frozen).lower()}" for i in range(2)]
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            self.cfg = hydra.compose(
                "train",
                [
                    *("experiment=medvqa_mevf", "trainer=cpu", "callbacks=[default]", "~callbacks.best"),
                    *(
                        f"data.sources=[{source}]",
                        "data.val_sources=[]",
                        "data.workers=0",
                        f"data.batch_size={BATCH}",
                        f"max_steps={steps}",
                    ),
                    *("model.visual.parts.0.pretrained=null", "epochs=20", f"loss.weights.drawn={DRAWN}", *parts),
                ],
            )
        self.cfg.model.visual.parts[0].architecture = {**tower, "text_cfg": TEXT}
        self.cfg.data.storage = {"index": str(table.parent / "index")}
        known = list(build(self.cfg.data.labels.names))
        self.cfg.data.labels.names = known + [f"open: {i}" for i in range(ANSWERS - len(known))]

    def task(self, *, dropout: bool = True) -> Any:
        torch.manual_seed(0)
        task = build(self.cfg.task)
        for module in task.modules():
            if isinstance(module, nn.Dropout) and not dropout:
                module.p = 0.0
        return task

    def train(self, task: Any, clock: pl.Callback) -> None:
        """As `medclip train` does."""
        with tempfile.TemporaryDirectory() as output:
            cfg = self.cfg.copy()
            cfg.output = output
            callbacks = [*build(cfg.callbacks).values(), clock]
            trainer: pl.Trainer = build(cfg.trainer, callbacks=callbacks, logger=list(build(cfg.logger).values()))
            with contextlib.redirect_stderr(io.StringIO()):  # the progress line
                trainer.fit(task, datamodule=build(cfg.data))


class Clock(pl.Callback):
    """Losses of all steps, the first batches themselves where they are wanted, and the cost of those after `start`."""

    def __init__(self, start: int, steps: int, keep: int = 0) -> None:
        self.start, self.steps, self.keep = start, steps, keep
        self.losses: list[float] = []
        self.batches: list[Any] = []
        self.cost: Cost | None = None
        self.watch = Stopwatch()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        if len(self.batches) < self.keep:
            self.batches.append(batch)
        if batch_idx + 1 == self.start:
            self.watch = Stopwatch()
        elif batch_idx + 1 == self.start + self.steps:
            self.cost = self.watch.read(self.steps)


class Questions(Dataset[tuple[Tensor, ...]]):
    """The questions of some batches, as the published loader holds them: finished images as float arrays."""

    def __init__(self, batches: Sequence[Any], model: VqaModel) -> None:
        clip, dae = model.visual.parts
        numbers: dict[bytes, int] = {}
        images, self.rows = [], []
        for batch in batches:
            for image, text, label in zip(batch["image"], batch["text"], batch["label"], strict=True):
                name = image.numpy().tobytes()
                if name not in numbers:
                    numbers[name] = len(images)
                    images.append(image)
                self.rows.append((numbers[name], text, int(label.argmax())))
        together: Any = {"image": torch.stack(images)}
        self.answers = batches[0]["label"].shape[1]
        self.clip, self.grey = clip.pixels.normalise_image(together), dae.net.grey(together)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        image, text, answer = self.rows[index]
        target = torch.zeros(self.answers)
        target.scatter_(0, torch.tensor([answer]), torch.ones(1))
        return self.clip[image].reshape(-1), self.grey[image].reshape(-1), text, target


def published(model: VqaModel, image: Tensor, grey: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and the drawn pictures by the papers' formulas, in the order of the published code."""
    clip, dae = model.visual.parts
    net = dae.net
    code = F.max_pool2d(F.relu(net.conv1(grey)), 2)
    code = F.relu(net.conv3(F.max_pool2d(F.relu(net.conv2(code)), 2)))
    drawn = F.relu(net.conv4(F.relu(net.tran_conv1(code))))
    drawn = torch.sigmoid(net.conv5(F.relu(net.tran_conv2(drawn))))
    small = dae.convert(code.view(len(code), -1)).unsqueeze(1)
    objects = torch.cat([clip.net(image).unsqueeze(1), small], 2)

    first, second = model.questions.tables
    words, _ = model.questions.rnn(torch.cat([first(text), second(text)], 2))

    fusion = model.head.fusion
    looks = fusion.attention
    seen = looks.dropout(looks.objects(objects)).unsqueeze(1) * looks.kernel[None, :, None, :]
    logits = torch.matmul(seen, looks.words(words).unsqueeze(1).transpose(2, 3))
    nothing = (objects.abs().sum(2) == 0)[:, None, :, None].expand(logits.size())
    weight = logits.masked_fill(nothing, -torch.inf).flatten(2).softmax(2).view(logits.size())
    for g, (see, read, onward) in enumerate(zip(fusion.objects, fusion.words, fusion.onward, strict=True)):
        rows = see(objects).transpose(1, 2).unsqueeze(2)  # (b, channels, 1, v)
        columns = read(words).transpose(1, 2).unsqueeze(3)  # (b, channels, q, 1)
        pooled = torch.matmul(torch.matmul(rows, weight[:, g].unsqueeze(1)), columns).squeeze(3).squeeze(2)
        words = onward(pooled.unsqueeze(1)) + words
    return model.head.classifier(words.sum(1)), drawn


class Published:
    """The published trainer's step."""

    def __init__(self, model: VqaModel, lr: float) -> None:
        self.model = model.train().to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adamax(self.parameters, lr=0.5 * lr)  # the first epoch's
        self.flat: Tensor | None = None

    def step(self, image: Tensor, grey: Tensor, text: Tensor, target: Tensor) -> float:
        image, grey = image.view(len(text), 3, 224, 224), grey.view(len(text), 1, 128, 128)
        logits, drawn = published(self.model, image, grey, text)
        loss = F.binary_cross_entropy_with_logits(logits, target, reduction="sum")
        loss = (loss + 0.001 * F.mse_loss(drawn, grey)) / len(target)
        best = torch.zeros_like(target).scatter_(1, logits.detach().argmax(1, keepdim=True), 1)
        float((best * target).sum())
        loss.backward()
        self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def _clip(self, most: float = 0.25) -> None:
        grads = [p.grad for p in self.parameters if p.grad is not None]
        if self.flat is None:
            self.flat = torch.zeros(sum(grad.numel() for grad in grads))
        offset = 0
        for grad in grads:
            self.flat[offset : offset + grad.numel()].copy_(grad.contiguous().view(-1))
            offset += grad.numel()
        norm = float(self.flat.norm())
        if norm > most:
            self.flat.mul_(most / (norm + 1e-6))
        offset = 0
        for grad in grads:
            grad.copy_(self.flat[offset : offset + grad.numel()].view_as(grad))
            offset += grad.numel()


def train_published(model: VqaModel, loader: Iterable[Sequence[Tensor]], lr: float, start: int) -> Iterator[Cost]:
    """The cost of the steps after `start`, each time one more is done."""
    trainer = Published(model, lr)
    watch = Stopwatch()
    for done, batch in enumerate(loader, 1):
        trainer.step(*batch)
        if done == start:
            watch = Stopwatch()
        elif done > start:
            yield watch.read(done - start)


def check(experiment: Experiment) -> list[Any]:
    """Stop unless the first losses are the same without dropout; the batches."""
    clock = Clock(0, 0, keep=PASS)
    task = experiment.task(dropout=False)
    dataset_of = experiment.task(dropout=False).model
    experiment.train(task, clock)
    trainer = Published(dataset_of, experiment.cfg.optim.lr)
    loader = DataLoader(Questions(clock.batches, dataset_of), BATCH)
    losses = [trainer.step(*batch) for _, batch in zip(clock.losses, loader, strict=False)]
    apart = [abs(a - b) / abs(b) for a, b in zip(clock.losses, losses, strict=True)]
    print(f"losses without dropout, ours and {PEER}: {clock.losses} {losses}", flush=True)
    if apart[0] > 1e-5 or max(apart) > 1e-3:  # later ones have gone through steps whose roundings differ
        sys.exit("vqa: the losses differ, so the speeds do not compare")
    return clock.batches


def main() -> None:
    args = arguments(__doc__)
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    tower = TOWERS[args.quick]
    steps, runs = (1, 3) if args.quick else (3, 5)
    with tempfile.TemporaryDirectory() as folder:
        table = write_questions(Path(folder))
        trained = Experiment(table, tower, frozen=False, steps=1 + steps)
        cached = Experiment(table, tower, frozen=True, steps=PASS + 4 * steps)
        compared = Experiment(table, tower, frozen=False, steps=2)
        check(compared)
        batches = every_batch(cached)

        def ours(experiment: Experiment, start: int, count: int) -> Cost:
            clock = Clock(start, count)
            experiment.train(experiment.task(), clock)
            assert clock.cost is not None
            return clock.cost

        def peer() -> Cost:
            model = trained.task().model
            loader = DataLoader(Questions(batches, model), BATCH)
            return list(train_published(model, loader, trained.cfg.optim.lr, 1))[steps - 1]

        sides = [(lambda: ours(trained, 1, steps), "vqa"), (lambda: ours(cached, PASS, 4 * steps), "vqa_cached")]
        found = {name: interleave(side, peer, runs=runs, warm_up=False) for side, name in sides}
    print(f"batch {BATCH}, {tower['vision_cfg']}")
    for name, pairs in found.items():
        report(name, pairs, unit="step", peer=PEER)


def every_batch(experiment: Experiment) -> list[Any]:
    """The batches of the first pass."""
    clock = Clock(0, 0, keep=PASS)
    experiment.train(experiment.task(), clock)
    return clock.batches


if __name__ == "__main__":
    main()
