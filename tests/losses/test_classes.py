"""Cross entropy of classes against torch's own, and by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from medclip.losses.classes import ClassesLoss


def test_it_is_torchs_cross_entropy_with_its_gradient() -> None:
    dice = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(7, 4, generator=dice, dtype=torch.float64)).requires_grad_()
    index = torch.randint(4, (7,), generator=dice)
    label = F.one_hot(index, 4).float()
    ours, theirs = ClassesLoss()(logits, {"label": label}), F.cross_entropy(logits, index)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-15)


def test_by_hand() -> None:
    # Three equal logits cost log 3; one that stands out by log 8 over one other costs log(1 + 1 / 8).
    loss = ClassesLoss()
    assert loss(torch.zeros(2, 3), {"label": torch.eye(3)[:2]}).item() == pytest.approx(math.log(3), abs=1e-6)
    apart = torch.tensor([[math.log(8), 0.0]])
    assert loss(apart, {"label": torch.tensor([[1.0, 0.0]])}).item() == pytest.approx(math.log1p(1 / 8), abs=1e-6)


def test_low_precision_is_left_before_the_logarithm() -> None:
    """In bfloat16 log(1 + 2e-3) is 0; half precision overflows at exp(12)."""
    logits = torch.tensor([[6.25, 0.0], [100.0, 0.0]])
    label = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    for dtype in (torch.bfloat16, torch.float16):
        found = ClassesLoss()(logits.to(dtype), {"label": label})
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx((math.log1p(math.exp(-6.25)) + 100) / 2, abs=1e-6)
