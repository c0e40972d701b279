"""A small model of slides, numbered batches of bags, and a task, against the contract of `Batch` and `MilOut`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from medclip.losses.bag_classes import BagClassesLoss
from medclip.losses.bag_multilabel import BagMultilabelLoss
from medclip.losses.bag_ordinal import BagOrdinalLoss
from medclip.losses.cox import CoxLoss
from medclip.losses.extra import ExtraLoss
from medclip.losses.survival import SurvivalLoss
from medclip.tasks.mil import MilTask
from tests.tasks.rows import parts

GRADES = ["none", "low", "high"]
DIM = 6
LOSSES: dict[str, nn.Module] = {
    "classes": BagClassesLoss(),
    "ordinal": BagOrdinalLoss(),
    "multilabel": BagMultilabelLoss(),
    "survival": SurvivalLoss(),
    "cox": CoxLoss(),
}


class Out(NamedTuple):
    logits: Tensor
    extra: Tensor
    attention: Tensor


class MeanModel(nn.Module):
    """A linear layer on the mean of a bag's patches; its own loss is the size of the logits."""

    tokenizer = None
    extra_names = ("size",)

    def __init__(self, target: str) -> None:
        super().__init__()
        outputs = {"ordinal": 2, "cox": 1}.get(target, 3)
        self.description = {"kind": "toy", "target": "survival" if target == "cox" else target, "classes": GRADES}
        self.linear = nn.Linear(DIM, outputs)

    def forward(self, batch: Any) -> Out:
        real = batch["real"].float()
        shares = real / real.sum(1, keepdim=True).clamp(min=1)
        logits = self.linear((shares.unsqueeze(2) * batch["bag"]).sum(1))
        return Out(logits, logits.square().mean(1, keepdim=True), shares.unsqueeze(1))


def mil_task(target: str, lr: float = 0.05, **options: Any) -> MilTask:
    torch.manual_seed(0)
    losses = {target: LOSSES[target], "extra": ExtraLoss()}
    return MilTask(MeanModel(target), losses, **parts(lr), weights={"extra": 0.001}, **options)


def bags(number: int, target: str, n: int = 6, rows: int = 6) -> dict[str, Any]:
    """`n` bags of up to 5 patches, padded to `rows`: the grade is how far the first feature lies."""
    generator = torch.Generator().manual_seed(number)
    grade = torch.randint(0, 3, (rows,), generator=generator)
    bag = torch.randn(rows, 5, DIM, generator=generator)
    bag[:, :, 0] = 4 * grade[:, None] + 0.3 * bag[:, :, 0]
    real = torch.arange(5) < torch.randint(1, 6, (rows, 1), generator=generator)
    batch: dict[str, Any] = {"bag": bag * real.unsqueeze(2), "real": real, "epoch": 0, "skipped": 0}
    if target == "ordinal":
        batch["label"] = (torch.arange(2) < grade[:, None]).float()
    elif target in ("survival", "cox"):
        batch["time"] = 10 - 4 * grade + torch.rand(rows, generator=generator)
        batch["event"] = (torch.rand(rows, generator=generator) < 0.7).float()
        batch["label"] = torch.eye(3)[2 - grade]
    elif target == "multilabel":
        batch["label"] = torch.stack([grade > 0, grade > 1, grade < 1], 1).float()
    else:
        batch["label"] = torch.eye(3)[grade]
    batch["key"] = [f"{number}-{row}" for row in range(n)]
    return batch
