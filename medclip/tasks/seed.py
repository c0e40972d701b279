"""Random draws of a step that depend on its place in the run alone, so that a resumed run makes the same ones."""

from __future__ import annotations

import numpy as np
import torch


def seed_step(seed: int, epoch: int, batch: int, rank: int) -> None:
    """Seed torch's generators (CPU and devices) for one step of one rank."""
    state = np.random.SeedSequence([seed, epoch, batch, rank]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(state))
