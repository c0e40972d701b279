"""Every loss through its task on two gloo ranks under Lightning's DDP: losses and weights of one process with all rows.

In float64, so that nothing hides in rounding; gradients are clipped by their norm, and the last batch is uneven.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip import CLIP

from medclip.losses.bce import BceLoss
from medclip.losses.clip import ClipLoss
from medclip.losses.mae import MaeLoss
from medclip.losses.siglip import SiglipLoss
from medclip.models.clip import Clip
from medclip.models.mae import build_mae
from medclip.models.vit import build_vit
from medclip.tasks.base import Task
from medclip.tasks.clip import ClipTask
from medclip.tasks.mae import MaeTask
from medclip.tasks.multilabel import MultilabelTask
from medclip.types import Preprocess
from tests.tasks.rows import CLASSES, DECODER, SIZE, Losses, Stream, trainer

ROWS, PATCHES = 5, 16
REAL = [(5, 5), (5, 5), (5, 2)]  # of each rank, step by step; the rest is padding
VISION = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}


def contrastive(loss: torch.nn.Module) -> Task:
    torch.manual_seed(0)
    net = CLIP(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT, init_logit_bias=-1.0)  # type: ignore[arg-type]
    model = Clip(net, Preprocess(size=(32, 32)), tokenizer=None, description={"architecture": "tiny"})  # type: ignore[arg-type]
    return ClipTask(model, {"contrastive": loss}, **parts())


def masked() -> Task:
    """Its masks come with the rows: drawn by each rank, they would be others than one process draws."""
    torch.manual_seed(0)
    model = build_mae(**SIZE, **DECODER)
    forward = model.forward
    model.forward = lambda batch: forward(batch, batch["noise"])  # type: ignore[method-assign, typeddict-item]
    return MaeTask(model, {"reconstruction": MaeLoss()}, **parts())


def multilabel() -> Task:
    torch.manual_seed(0)
    return MultilabelTask(build_vit(CLASSES, **SIZE), {"bce": BceLoss()}, **parts())


def parts() -> dict[str, Any]:
    """SGD: what it makes of gradients that are twice too large is seen, Adam's steps would be the same."""
    return {
        "optimizer": lambda named: torch.optim.SGD([p for _, p in named], lr=0.1, momentum=0.9),
        "schedule": lambda optimizer, total: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
    }


TASKS: dict[str, Callable[[], Task]] = {
    "clip": lambda: contrastive(ClipLoss()),
    "siglip": lambda: contrastive(SiglipLoss()),
    "mae": masked,
    "bce": multilabel,
}


def batch(rank: int, step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    n = REAL[step][rank]
    return {
        "image": torch.randint(0, 256, (ROWS, 3, 32, 32), dtype=torch.uint8, generator=generator),
        "text": torch.randint(1, 64, (ROWS, 8), generator=generator),
        "label": torch.randint(0, 2, (ROWS, len(CLASSES)), generator=generator).double(),
        "noise": torch.rand(ROWS, PATCHES, generator=generator),
        "key": [f"{rank}-{step}-{row}" for row in range(n)],
    }


def together(step: int) -> dict[str, Any]:
    """Both ranks' real rows."""
    pairs = list(zip((batch(rank, step) for rank in (0, 1)), REAL[step], strict=True))
    rows = {name: torch.cat([part[name][:n] for part, n in pairs]) for name in ("image", "text", "label", "noise")}
    return {**rows, "key": [key for part, _ in pairs for key in part["key"]]}


def fit(task: Task, batches: list[dict[str, Any]], folder: Path, **ranks: Any) -> tuple[list[float], dict[str, Any]]:
    """The loss of each step, and the weights after the last."""
    losses = Losses()
    options = {"precision": "64-true", "gradient_clip_val": 0.5, "use_distributed_sampler": False}
    trainer(folder, losses, **options, **ranks).fit(task, Stream(batches))
    return [float.fromhex(value) for value in losses.seen], {n: p.detach() for n, p in task.named_parameters()}


def run_rank(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in (names | address).items()})
    batches = [batch(rank, step) for step in range(len(REAL))]
    found = {name: fit(make(), batches, folder, strategy="ddp", devices=2) for name, make in TASKS.items()}
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.set_forkserver_preload(["tests.tasks.test_ranks"])
    torch.multiprocessing.start_processes(run_rank, (port, folder), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", TASKS)
def test_two_ranks_equal_one_process(name: str, ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    losses, weights = fit(TASKS[name](), [together(step) for step in range(len(REAL))], tmp_path, devices=1)
    theirs = [found[name][0] for found in ranks]
    assert [sum(pair) / 2 for pair in zip(*theirs, strict=True)] == pytest.approx(losses, rel=1e-12)
    assert len(set(losses)) == len(REAL)
    start = dict(TASKS[name]().double().named_parameters())
    for found in ranks:
        for key, value in weights.items():
            torch.testing.assert_close(found[name][1][key], value, rtol=1e-10, atol=1e-12)
    assert max((value - start[key]).abs().max() for key, value in weights.items()) > 1e-3
