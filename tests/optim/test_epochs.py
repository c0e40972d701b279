"""Learning rates by epoch, against the published list."""

from __future__ import annotations

import pytest
import torch

from medclip.optim.epochs import by_epochs
from medclip.types import UserError


def test_mevfs_rates():
    """MEVF's loop: gradual warm-up in epochs 0 to 3, then 0.75 of what it was at 10, 12, 14, 16, 18."""
    rates, rate = [], 0.0
    for epoch in range(20):
        if epoch < 4:
            rate = (0.5, 1.0, 1.5, 2.0)[epoch] * 0.002
        elif epoch in range(10, 20, 2):
            rate *= 0.75
        rates += [rate] * 7
    optimizer = torch.optim.Adamax([torch.nn.Parameter(torch.zeros(1))], lr=0.002)
    options = {"warmup": [0.5, 1.0, 1.5, 2.0], "decay": 0.75, "at": [10, 12, 14, 16, 18]}
    schedule, found = by_epochs(optimizer, 140, epochs=20, **options), []
    for _ in range(140):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert found == pytest.approx(rates)


def test_it_stays_as_it_is_and_refuses_what_makes_no_sense():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = by_epochs(optimizer, 5, epochs=2)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.1
    with pytest.raises(UserError, match="epochs is 0"):
        by_epochs(optimizer, 5, epochs=0)
    with pytest.raises(UserError, match="numbers above 0"):
        by_epochs(optimizer, 5, epochs=2, warmup=[0.0, 1.0])
