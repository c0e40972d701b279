"""Bags of a few patches, and small heads on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from medclip.heads.abmil import Abmil
from medclip.heads.acmil import Acmil
from medclip.heads.clam import Clam
from medclip.heads.dsmil import Dsmil
from medclip.heads.pool import MaxPool, MeanPool
from medclip.heads.transmil import TransMil

DIM, CLASSES = 12, 3

HEADS: dict[str, Callable[..., nn.Module]] = {
    "mean": lambda **o: MeanPool(DIM, CLASSES, hidden=8, **o),
    "max": lambda **o: MaxPool(DIM, CLASSES, hidden=8, **o),
    "abmil": lambda **o: Abmil(DIM, CLASSES, hidden=8, attention=6, **o),
    "abmil_plain": lambda **o: Abmil(DIM, CLASSES, hidden=8, attention=6, gated=False, **o),
    "clam_sb": lambda **o: Clam(DIM, CLASSES, k_sample=2, **o),
    "clam_mb": lambda **o: Clam(DIM, CLASSES, k_sample=2, branches="each", subtyping=True, instance_loss="ce", **o),
    "dsmil": lambda **o: Dsmil(DIM, CLASSES, query=6, **o),
    "dsmil_values": lambda **o: Dsmil(DIM, CLASSES, query=6, nonlinear=False, values=True, **o),
    "transmil": lambda **o: TransMil(DIM, CLASSES, **dict[str, Any](hidden=8, heads=2, landmarks=6) | o),
    "transmil_paper": lambda **o: TransMil(DIM, CLASSES, hidden=8, heads=2, landmarks=6, compat="paper", **o),
    "acmil": lambda **o: Acmil(DIM, CLASSES, **dict[str, Any](hidden=8, attention=6, tokens=3, masked=4) | o),
}


def head_of(name: str, seed: int = 0, **options: object) -> nn.Module:
    """One of `HEADS`, in double precision, so that what must be equal is."""
    torch.manual_seed(seed)
    return HEADS[name](**options).double()


def bag_of(n: int, b: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(b, n, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def all_real(bag: Tensor) -> Tensor:
    return torch.ones(bag.shape[:2], dtype=torch.bool)


def one_hot(*classes: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(classes), CLASSES).double()
