"""The schedule against open_clip's own and against its closed formula at the ends."""

from __future__ import annotations

import math

import pytest
import torch
from open_clip_train.scheduler import cosine_lr

from medclip.optim.schedule import lr_at, warmup_cosine
from medclip.types import UserError


def optimizer(*lrs: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in lrs])


def walk(opt: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler, steps: int) -> list[list[float]]:
    """Learning rates of all groups that each optimiser step was made with."""
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in opt.param_groups])
        opt.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_equals_open_clip(warmup):
    mine, theirs = optimizer(1e-3), optimizer(1e-3)
    adjust = cosine_lr(theirs, 1e-3, warmup, 50)
    expected = [adjust(step) for step in range(50)]
    schedule = warmup_cosine(mine, 50, warmup=warmup)
    assert [r[0] for r in walk(mine, schedule, 50)] == pytest.approx(expected, rel=1e-12)


def test_fraction_floor_and_groups():
    opt = optimizer(1.0, 0.1)
    schedule = warmup_cosine(opt, 100, warmup=0.2, min_lr=0.05)
    rates = walk(opt, schedule, 101)
    assert rates[0] == pytest.approx([0.05, 0.005])  # 1/20 of the peak
    assert rates[19] == rates[20] == pytest.approx([1.0, 0.1])
    assert rates[60] == pytest.approx([0.525, 0.075])  # half-way: the mean of peak and floor
    assert rates[100] == pytest.approx([0.05, 0.05])
    for step in (0, 33, 77):
        assert rates[step][0] == pytest.approx(lr_at(step, lr=1.0, total=100, warmup=20, min_lr=0.05))
    closed = 0.05 + 0.95 * (1 + math.cos(math.pi * 57 / 80)) / 2
    assert rates[77][0] == pytest.approx(closed)


def test_resumes_where_it_was():
    opt = optimizer(1.0)
    schedule = warmup_cosine(opt, 30, warmup=5)
    whole = walk(opt, schedule, 30)
    first = optimizer(1.0)
    schedule = warmup_cosine(first, 30, warmup=5)
    walk(first, schedule, 12)
    second = optimizer(1.0)
    resumed = warmup_cosine(second, 30, warmup=5)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    assert walk(second, resumed, 18) == whole[12:]


@pytest.mark.parametrize(("options", "word"), [({"warmup": -1}, "warmup"), ({"min_lr": 2.0}, "min_lr")])
def test_nonsense_is_refused(options, word):
    with pytest.raises(UserError, match=word):
        warmup_cosine(optimizer(1.0), 10, **options)
