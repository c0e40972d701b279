"""Training of slide-level heads on cached features, in slides a second: the loop of CLAM's repository over ours.

    scripts/bench/mil.py [--quick]

Ours is what `medclip train experiment=mil_abmil` and `mil_clam` run with `trainer=cpu`, one whole slide a step. The
peer is the training loop of CLAM's repository (arXiv:2004.09666), written anew: a DataLoader that opens a slide's HDF5
file at each step (no worker processes where there is no GPU, as it has it), chunks of one row, as TRIDENT writes them;
CLAM-SB with one classifier of patches a class and what they say brought to numpy, `.item()` at each loss, accuracies
counted with numpy, a line printed each 20 slides. ABMIL is its loop without instance loss. Both hold the same weights
and see the same slides in the same order, on one thread; without dropout the first loss must agree to 1e-5 and those of
later steps to 1 %, or there is no ratio. (ABMIL's agree to 1e-6 throughout. CLAM's drift apart by up to 0.3 %: of many
random patches with nearly the same attention, rounding decides which eight are the highest.)

`mil_abmil`, `mil_clam`: whole steps, of epochs after the first, in which ours has read all slides. `mil_reading`: the
same without the model, which is what a step costs where a device makes the model's part small. `mil_reading_pt`: the
same against torch.load of the `.pt` files that CLAM trains from by default. `mil_memory`: peak memory of a process that
trains on one slide of 200,000 patches of 1,024 numbers (--quick: 50,000), the peer's over ours; with CLAM.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import resource
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import hydra
import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from _timing import Cost, Stopwatch, arguments, interleave, measure, report
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

sys.path.remove(str(Path(__file__).resolve().parent))  # where slides.py is a benchmark, and not the package
from medclip.config import CONF, build

PEER = "CLAM-restated"
DIM = 1024
BAG_WEIGHT = 0.7  # CLAM's; the rest is the patches'
K = 8
HEADS = ("abmil", "clam")


def write_slides(folder: Path, sizes: Sequence[int]) -> None:
    """Slides of random features in our layout, for the peer in chunks of a row and as tensors; and their table."""
    rng = np.random.default_rng(0)
    rows = ["slide,patient,label,split"]
    for name in ("ours", "h5_files", "pt_files"):
        (folder / name).mkdir()
    for number, n in enumerate(sizes):
        features = np.maximum(rng.standard_normal((n, DIM), dtype=np.float32), 0)
        coords = np.stack([np.arange(n) % 400, np.arange(n) // 400], 1) * 256
        for name, chunk in (("ours", 256), ("h5_files", 1)):
            with h5py.File(folder / name / f"{number}.h5", "w") as file:
                file.create_dataset("features", data=features, chunks=(chunk, DIM), maxshape=(None, DIM))
                file.create_dataset("coords", data=coords, chunks=(chunk, 2), maxshape=(None, 2))
        torch.save(torch.from_numpy(features), folder / "pt_files" / f"{number}.pt")
        rows.append(f"{number},{number},{'ab'[number % 2]},train")
    (folder / "slides.csv").write_text("\n".join(rows) + "\n")


class Experiment:
    """One configuration of ours, built anew for each run from the same seed."""

    def __init__(self, folder: Path, head: str, steps: int, **data: Any) -> None:
        self.folder, self.slides = folder, sum(1 for _ in (folder / "slides.csv").open()) - 1
        own = {"workers": 0, "balance": "false", "split": "{field: split, train: train}", **data}
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            self.cfg = hydra.compose(
                "train",
                [
                    *(f"experiment=mil_{head}", "trainer=cpu", "callbacks=none", "logger=none", "epochs=1000"),
                    *(f"data.features={folder / 'ours'}", f"data.table={folder / 'slides.csv'}", f"max_steps={steps}"),
                    *(f"data.{key}={value}" for key, value in own.items()),
                ],
            )

    def task(self, *, dropout: bool = True) -> Any:
        torch.manual_seed(0)
        task = build(self.cfg.task)
        for module in task.modules():
            if isinstance(module, nn.Dropout) and not dropout:
                module.p = 0.0
        return task

    def train(self, task: Any, clock: pl.Callback | None = None) -> None:
        """As `medclip train` does."""
        with tempfile.TemporaryDirectory() as output, contextlib.redirect_stderr(io.StringIO()):
            cfg = self.cfg.copy()
            cfg.output = output
            trainer: pl.Trainer = build(cfg.trainer, callbacks=[clock] if clock else [], logger=False)
            trainer.fit(task, datamodule=build(cfg.data))

    def batches(self) -> Iterator[Any]:
        """What the model gets, without one, of a second pass."""
        with tempfile.TemporaryDirectory() as output, contextlib.redirect_stderr(io.StringIO()):
            cfg = self.cfg.copy()
            cfg.output = output
            data: Any = build(cfg.data)
            data.trainer = SimpleNamespace(global_rank=0, world_size=1)
            data.setup("fit")
            for number, batch in enumerate(data.train_dataloader(), 1):
                yield batch if number > self.slides else None


class Clock(pl.Callback):
    """Losses and slides of all steps, and the cost of those after `start`."""

    def __init__(self, start: int, steps: int) -> None:
        self.start, self.steps = start, steps
        self.losses: list[float] = []
        self.keys: list[str] = []
        self.cost: Cost | None = None
        self.watch = Stopwatch()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        self.keys += batch["key"]
        if batch_idx + 1 == self.start:
            self.watch = Stopwatch()
        elif batch_idx + 1 == self.start + self.steps:
            self.cost = self.watch.read(self.steps)


class Slides(Dataset[tuple[Tensor, int]]):
    """A slide's file, opened for each item."""

    def __init__(self, folder: Path, keys: Sequence[str], *, h5: bool = True) -> None:
        self.folder, self.keys, self.h5 = folder, keys, h5

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        key = self.keys[index]
        if not self.h5:
            return torch.load(self.folder / "pt_files" / f"{key}.pt"), int(key) % 2
        with h5py.File(self.folder / "h5_files" / f"{key}.h5") as file:
            features, _ = (file[name][:] for name in ("features", "coords"))  # pyright: ignore[reportIndexIssue]
        return torch.from_numpy(features), int(key) % 2

    def loader(self) -> DataLoader[Any]:
        def together(items: list[tuple[Tensor, int]]) -> list[Tensor]:
            return [torch.cat([features for features, _ in items]), torch.LongTensor([label for _, label in items])]

        return DataLoader(self, batch_size=1, shuffle=False, collate_fn=together)


class SmoothSvm(nn.Module):
    """Smooth top-1 SVM of two classes, margin and temperature 1 (arXiv:1802.07595)."""

    def forward(self, scores: Tensor, right: Tensor) -> Tensor:
        wrong = torch.ones_like(scores).scatter_(1, right[:, None], 0.0)
        return (torch.logsumexp(scores + wrong, 1) - scores.gather(1, right[:, None]).squeeze(1)).mean()


class Published(nn.Module):
    """CLAM-SB with gated attention, or ABMIL, holding a copy of our head's weights; one slide (n, dim) a call."""

    def __init__(self, head: Any, *, dropout: bool) -> None:
        super().__init__()

        def linear(module: nn.Linear, rows: slice = slice(None)) -> nn.Linear:
            weight, bias = module.weight.detach()[rows], module.bias.detach()[rows]
            made = nn.Linear(weight.shape[1], len(weight))
            made.load_state_dict({"weight": weight, "bias": bias})
            return made

        def drop() -> nn.Dropout:
            return nn.Dropout(0.25 if dropout else 0.0)

        scores = head.scores
        self.embed = nn.Sequential(linear(head.embed[0]), nn.ReLU(), drop())
        self.value = nn.Sequential(linear(scores.value[0]), nn.Tanh(), drop())
        self.gate = nn.Sequential(linear(scores.gate[0]), nn.Sigmoid(), drop())
        self.score = linear(scores.score)
        plain = isinstance(head.classifier, nn.Linear)
        self.classifier = linear(head.classifier) if plain else nn.Sequential(drop(), linear(head.classifier[1]))
        teaches = hasattr(head, "instances")
        self.instances = nn.ModuleList(linear(head.instances, slice(2 * c, 2 * c + 2)) for c in range(2 * teaches))
        self.instance_loss = SmoothSvm()

    def forward(self, h: Tensor, label: Tensor) -> tuple[Tensor, Tensor | None, np.ndarray, np.ndarray]:
        h = self.embed(h)
        attention = F.softmax(self.score(self.value(h).mul(self.gate(h))).transpose(1, 0), dim=1)
        total: Tensor | None = None
        said, right = [], []
        for number, classifier in enumerate(self.instances):
            if F.one_hot(label, num_classes=2).squeeze()[number].item() != 1:
                continue
            high = h.index_select(0, torch.topk(attention, K)[1][-1])
            low = h.index_select(0, torch.topk(-attention, K, dim=1)[1][-1])
            targets = torch.cat([torch.full((K,), 1), torch.full((K,), 0)])
            logits = classifier(torch.cat([high, low]))
            total = self.instance_loss(logits, targets) + (0.0 if total is None else total)
            said.extend(torch.topk(logits, 1, dim=1)[1].squeeze(1).cpu().numpy())
            right.extend(targets.cpu().numpy())
        logits = self.classifier(torch.mm(attention, h))
        return logits, total, np.array(said), np.array(right)


class Counter:
    """Accuracy by class."""

    def __init__(self) -> None:
        self.rows = [{"count": 0, "correct": 0} for _ in range(2)]

    def log(self, said: Any, right: Any) -> None:
        said, right = np.array(said).astype(int).reshape(-1), np.array(right).astype(int).reshape(-1)
        for label in np.unique(right):
            mine = right == label
            self.rows[label]["count"] += mine.sum()
            self.rows[label]["correct"] += (said[mine] == right[mine]).sum()


def train_published(model: Published, loader: DataLoader[Any]) -> Iterator[float]:
    """The loss of each step."""
    model.train()
    optimizer = torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad], lr=2e-4, weight_decay=1e-5, eps=1e-8
    )
    bags, patches = Counter(), Counter()
    error = 0.0
    for index, (data, label) in enumerate(loader):
        logits, instance_loss, said, right = model(data, label)
        best = torch.topk(logits, 1, dim=1)[1]
        F.softmax(logits, dim=1)
        bags.log(int(best), int(label))
        loss = F.cross_entropy(logits, label)
        value = loss.item()
        if instance_loss is not None:
            instance_value = instance_loss.item()
            loss = BAG_WEIGHT * loss + (1 - BAG_WEIGHT) * instance_loss
            patches.log(said, right)
            value = BAG_WEIGHT * value + (1 - BAG_WEIGHT) * instance_value
        if (index + 1) % 20 == 0:
            print(f"batch {index}, loss: {value:.4f}, label: {label.item()}, bag_size: {data.size(0)}")
        error += 1.0 - best.float().eq(label.float()).float().mean().item()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield value


def check(experiment: Experiment) -> list[str]:
    """Stop unless the first losses are the same without dropout; slides in their order."""
    clock = Clock(0, 0)
    task = experiment.task(dropout=False)
    model = Published(task.model.head, dropout=False)
    experiment.train(task, clock)
    losses = list(train_published(model, Slides(experiment.folder, clock.keys).loader()))
    apart = [abs(a - b) / abs(b) for a, b in zip(clock.losses, losses, strict=True)]
    print(f"losses without dropout, ours and {PEER}: {clock.losses} {losses}", flush=True)
    if apart[0] > 1e-5 or max(apart) > 1e-2:
        sys.exit("mil: the losses differ, so the speeds do not compare")
    return clock.keys


def peak(folder: Path, side: str) -> float:
    """GB that a process at most held which trained on one slide."""
    command = [sys.executable, __file__, "--memory", json.dumps([str(folder), side])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def train_one(folder: Path, side: str) -> None:
    """A process of its own for `peak`."""
    experiment = Experiment(folder, "clam", 2)
    task = experiment.task()
    if side == "ours":
        experiment.train(task)
    else:
        list(train_published(Published(task.model.head, dropout=True), Slides(folder, ["0", "0"]).loader()))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)


def main() -> None:
    args = arguments(__doc__, memory="")
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    if args.memory:
        folder, side = json.loads(args.memory)
        return train_one(Path(folder), side)
    rng = np.random.default_rng(0)
    slides, runs = (4, 3) if args.quick else (12, 5)
    sizes = rng.integers(1000, 3000, slides) if args.quick else rng.integers(4000, 12000, slides)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_slides(folder, sizes.tolist())
        print(f"{slides} slides of {min(sizes)} to {max(sizes)} patches, {DIM} numbers each", flush=True)
        for head in HEADS:
            order = check(Experiment(folder, head, slides))

            def ours(head: str = head) -> Cost:
                experiment, clock = Experiment(folder, head, 2 * slides), Clock(slides, slides)
                experiment.train(experiment.task(), clock)
                assert clock.cost is not None
                return clock.cost

            def peer(head: str = head, order: Sequence[str] = tuple(order)) -> Cost:
                model = Published(Experiment(folder, head, 1).task().model.head, dropout=True)
                with contextlib.redirect_stdout(io.StringIO()):
                    return measure(lambda: len(list(train_published(model, Slides(folder, order).loader()))))

            report(f"mil_{head}", interleave(ours, peer, runs=runs), unit="slide", peer=PEER)

        def read() -> Cost:
            batches = Experiment(folder, "abmil", 1, epochs=6).batches()
            for _ in range(slides):
                next(batches)
            watch = Stopwatch()
            return watch.read(sum(1 for _ in batches))

        for h5, figure in ((True, "mil_reading"), (False, "mil_reading_pt")):

            def read_peer(h5: bool = h5) -> Cost:
                loader = Slides(folder, [str(i) for i in range(slides)], h5=h5).loader()
                return measure(lambda: sum(1 for _ in loader))

            report(figure, interleave(read, read_peer, runs=runs), unit="slide", peer=PEER)
    patches = 50_000 if args.quick else 200_000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_slides(folder, [patches, 64])
        found = {side: peak(folder, side) for side in ("ours", "peer")}
    print(f"one slide of {patches} patches: " + ", ".join(f"{side} {gb:.2f} GB" for side, gb in found.items()))
    ratio = found["peer"] / found["ours"]
    print(f"mil_memory ratio={ratio:.3f} min={ratio:.3f} max={ratio:.3f} peer={PEER}")


if __name__ == "__main__":
    main()
