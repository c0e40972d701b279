"""Gathered features: losses and all gradients after DDP's averaging equal one process with the whole batch."""

from __future__ import annotations

import multiprocessing
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from medclip.losses.clip import clip_loss
from medclip.losses.siglip import siglip_loss
from medclip.tasks.gather import gather
from medclip.types import ClipOutput

ROWS, LOSSES = 5, {"clip": clip_loss, "siglip": siglip_loss}


class Towers(nn.Module):
    """Two small towers, a scale and a bias, in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        self.text = nn.Linear(6, 4)
        self.logit_scale = nn.Parameter(torch.tensor(1.5))
        self.logit_bias = nn.Parameter(torch.tensor(-1.0))
        self.double()

    def forward(self, x: Tensor, y: Tensor) -> ClipOutput:
        features = (F.normalize(tower(rows), dim=-1) for tower, rows in ((self.image, x), (self.text, y)))
        return ClipOutput(*features, self.logit_scale.exp(), self.logit_bias * 1.0)


def cases(world: int) -> list[tuple[int, ...]]:
    """Real rows per rank: all full, one empty rank, only one real row in all, and random ones."""
    rng = np.random.default_rng(world)
    drawn = [tuple(int(n) for n in rng.integers(0, ROWS + 1, world)) for _ in range(6)]
    fixed = [(ROWS,) * world, (0, *(ROWS - 1,) * (world - 1)), (*(0,) * (world - 1), 1), (3, *(0,) * (world - 1))]
    return [case for case in fixed + drawn if sum(case)]


def rows(rank: int, case: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * case + rank)
    x, y = (torch.randn(ROWS, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, y


def run_rank(rank: int, world: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    found: dict[Any, Any] = {}
    for number, counts in enumerate(cases(world)):
        for name, loss in LOSSES.items():
            model = DistributedDataParallel(Towers())
            value = loss(gather(model(*rows(rank, number)), counts[rank]))
            value.backward()
            found[number, name] = [value.detach(), *(p.grad for p in model.module.parameters())]
    found["empty"] = gather(Towers()(*rows(rank, 0)), 0).image_features.detach()
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_one_process(world, tmp_path):
    # A fork server imports torch once for all ranks; forking this process would not survive autograd's threads.
    multiprocessing.set_forkserver_preload(["torch.nn.parallel", "torch._dynamo"])
    args = (world, free_port(), tmp_path)
    torch.multiprocessing.start_processes(run_rank, args, nprocs=world, start_method="forkserver")
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for number, counts in enumerate(cases(world)):
        parts = [[t[:n] for t in rows(rank, number)] for rank, n in enumerate(counts)]
        x, y = (torch.cat(column) for column in zip(*parts, strict=True))
        for name, loss in LOSSES.items():
            model = Towers()
            value = loss(model(x, y))
            value.backward()
            expected = [value.detach(), *(p.grad for p in model.parameters())]
            for theirs in found:
                torch.testing.assert_close(theirs[number, name], expected, atol=1e-6, rtol=1e-6)
    assert all(theirs["empty"].shape == (0, 4) for theirs in found)


@pytest.mark.parametrize("n", [0, 1, ROWS])
def test_one_process_drops_padding_only(n):
    out = Towers()(*rows(0, 0))
    kept = gather(out, n)
    assert torch.equal(kept.image_features, out.image_features[:n])
    assert torch.equal(kept.text_features, out.text_features[:n])
    assert kept.logit_scale is out.logit_scale
