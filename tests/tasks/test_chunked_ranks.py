"""Chunked steps on two ranks: gradients, and weights after three steps, are those of one process with all rows.

In float64 within 1e-12. In float32 the whole batch itself, in one process, is up to 4e-6 from that (SigLIP's bias,
whose gradient is a small difference of large sums), and its weights after three steps up to 9e-5: two float32 results
cannot be closer than their own rounding. What is asked there is that ranks and chunks are no farther from the truth.
"""

from __future__ import annotations

import multiprocessing
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from open_clip import CLIP
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from medclip.losses.clip import clip_loss
from medclip.losses.siglip import siglip_loss
from medclip.models.chunked import chunked
from medclip.models.clip import Clip
from medclip.tasks.gather import gather
from medclip.types import Batch, Preprocess

ROWS, WORLD, STEPS = 6, 2, 3
LOSSES = {"clip": clip_loss, "siglip": siglip_loss}
REAL = {"even": (6, 6), "uneven": (6, 3), "empty": (0, 5)}  # real rows of each rank; the rest is padding
CASES = [(loss, real, chunk) for loss in LOSSES for real in REAL for chunk in (None, 4)]
VISION = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
DTYPES = (torch.float64, torch.float32)


def clip(dtype: torch.dtype, chunk: int | None) -> Clip:
    torch.manual_seed(0)
    net = CLIP(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT, init_logit_bias=-1.0)  # type: ignore[arg-type]
    model = Clip(net, Preprocess(size=(32, 32)), tokenizer=None, description={}).to(dtype).train()  # type: ignore[arg-type]
    return model if chunk is None else chunked(model, chunk)


def batch(rank: int, step: int) -> Batch:
    generator = torch.Generator().manual_seed(100 * step + rank)
    image = torch.randint(0, 256, (ROWS, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Batch(image=image, text=torch.randint(1, 64, (ROWS, 8), generator=generator))


def train(model: Any, net: Clip, batches: list[Batch], real: int, loss: Any) -> dict[str, Tensor]:
    """The first step's gradients and the weights after all steps."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)  # linear in the gradient, unlike Adam
    found: dict[str, Tensor] = {}
    for given in batches:
        optimizer.zero_grad()
        loss(gather(model(given), real)).backward()
        if not found:
            found = {f"grad {name}": p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
        optimizer.step()
    return found | {name: p.detach().clone() for name, p in net.named_parameters()}


def run_rank(rank: int, world: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    found = {}
    for dtype in DTYPES:
        for loss, real, chunk in CASES:
            net = clip(dtype, chunk)
            model = DistributedDataParallel(net)
            batches = [batch(rank, step) for step in range(STEPS)]
            found[dtype, loss, real, chunk] = train(model, net, batches, REAL[real][rank], LOSSES[loss])
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def together(step: int, real: tuple[int, ...]) -> Batch:
    parts = [batch(rank, step) for rank in range(WORLD)]
    return Batch(
        image=torch.cat([part["image"][:n] for part, n in zip(parts, real, strict=True)]),  # type: ignore
        text=torch.cat([part["text"][:n] for part, n in zip(parts, real, strict=True)]),  # type: ignore
    )


def test_two_ranks_equal_one_process_chunked_or_not(tmp_path: Path) -> None:
    multiprocessing.set_forkserver_preload(["torch.nn.parallel", "torch._dynamo"])
    args = (WORLD, free_port(), tmp_path)
    torch.multiprocessing.start_processes(run_rank, args, nprocs=WORLD, start_method="forkserver")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    for loss, real, chunk in CASES:
        truth, rounded = (whole(dtype, loss, real) for dtype in DTYPES)
        for found in ranks:
            assert error(found[torch.float64, loss, real, chunk], truth) < 1e-12, (loss, real, chunk)
            ours = found[torch.float32, loss, real, chunk]
            for start in ("grad ", "net."):
                most = 2 * error(rounded, truth, start)
                assert most < 1e-3 and error(ours, truth, start) < most, (loss, real, chunk, start)
    grads = [ranks[0][torch.float64, "clip", real, 4]["grad net.visual.proj"] for real in ("even", "uneven")]
    assert (grads[0] - grads[1]).norm() > 1e-2 * grads[0].norm()  # the padding would show


def whole(dtype: torch.dtype, loss: str, real: str) -> dict[str, Tensor]:
    """What one process makes of all rows at once."""
    model = clip(dtype, None)
    batches = [together(step, REAL[real]) for step in range(STEPS)]
    return train(model, model, batches, sum(REAL[real]), LOSSES[loss])


def error(found: dict[str, Tensor], expected: dict[str, Tensor], start: str = "") -> float:
    """The largest relative error of what is named so; CLIP's loss does not depend on the bias: rounding about 0."""
    assert found.keys() == expected.keys()
    names = [name for name in expected if name.startswith(start)]
    norms = {name: expected[name].norm().clamp(min=0.1) for name in names}
    return max(((found[name].double() - expected[name]).norm() / norms[name]).item() for name in names)
