"""Peak memory of one training step of a head on a long bag: python -m tests.heads.bag_memory HEAD PATCHES DIM.

Prints the highest resident size of the process in GB, the bag and the library among it.
"""

from __future__ import annotations

import resource
import sys
from functools import partial

import torch

from medclip.heads.abmil import Abmil
from medclip.heads.acmil import Acmil
from medclip.heads.clam import Clam
from medclip.heads.dsmil import Dsmil
from medclip.heads.transmil import TransMil
from medclip.models.mil import MilModel
from medclip.types import Batch

HEADS = {
    "abmil": partial(Abmil, attention=256, dropout=0.25),
    "clam_sb": partial(Clam),
    "clam_mb": partial(Clam, branches="each", subtyping=True),
    "dsmil": partial(Dsmil),
    "transmil": partial(TransMil),
    "acmil": partial(Acmil),
}


def step(head: str, patches: int, dim: int) -> None:
    """Forward and backward, as training does them."""
    torch.manual_seed(0)
    model = MilModel(HEADS[head], dim, ["a", "b"]).train()
    batch: Batch = {
        "bag": torch.empty(1, patches, dim).normal_(),
        "real": torch.ones(1, patches, dtype=torch.bool),
        "label": torch.tensor([[0.0, 1.0]]),
    }
    out = model(batch)
    (torch.nn.functional.cross_entropy(out.logits, torch.tensor([1])) + out.extra.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


if __name__ == "__main__":
    step(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
