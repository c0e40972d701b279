"""The contrastive losses against open_clip's and against a case worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss as OpenClipLoss
from open_clip.loss import SigLipLoss as OpenSiglipLoss

from medclip.losses.clip import ClipLoss, clip_loss
from medclip.losses.siglip import SiglipLoss, siglip_loss
from medclip.types import ClipOutput


def output(n: int, d: int, *, scale: float = 10.0, bias: float | None = None, dtype=torch.float32) -> ClipOutput:
    generator = torch.Generator().manual_seed(n * 100 + d)
    image, text = (F.normalize(torch.randn(n, d, generator=generator, dtype=dtype), dim=-1) for _ in range(2))
    return ClipOutput(
        image.requires_grad_(),
        text.requires_grad_(),
        torch.tensor(scale, dtype=dtype, requires_grad=True),
        None if bias is None else torch.tensor(bias, dtype=dtype, requires_grad=True),
    )


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


# Images e1, e2; texts e1 and (0.6, 0.8); scale 2: logits [[2, 1.2], [0, 1.6]].
BY_HAND = ClipOutput(torch.eye(2), torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor(2.0))


def test_clip_by_hand():
    rows = softplus(1.2 - 2.0) + softplus(0.0 - 1.6)
    columns = softplus(0.0 - 2.0) + softplus(1.2 - 1.6)
    assert clip_loss(BY_HAND).item() == pytest.approx((rows + columns) / 4, abs=1e-6)


def test_siglip_by_hand():
    # -log sigmoid(x) = softplus(-x); with bias -1 the logits are [[1, 0.2], [-1, 0.6]].
    expected = (softplus(-1.0) + softplus(0.2) + softplus(-1.0) + softplus(-0.6)) / 2
    assert siglip_loss(BY_HAND._replace(logit_bias=torch.tensor(-1.0))).item() == pytest.approx(expected, abs=1e-6)


def test_limits():
    """Nothing known: log n, and n log 2. A single pair is no contrast."""
    flat = ClipOutput(F.normalize(torch.ones(8, 4), dim=-1), F.normalize(torch.ones(8, 4), dim=-1), torch.tensor(7.0))
    assert clip_loss(flat).item() == pytest.approx(math.log(8), abs=1e-6)
    assert siglip_loss(flat._replace(logit_scale=torch.tensor(0.0))).item() == pytest.approx(8 * math.log(2), abs=1e-5)
    assert clip_loss(output(1, 4)).item() == 0.0


@pytest.mark.parametrize("n", [2, 7, 32])
@pytest.mark.parametrize("bias", [None, -10.0])
@pytest.mark.parametrize(("ours", "theirs"), [(ClipLoss, OpenClipLoss), (SiglipLoss, OpenSiglipLoss)])
def test_equals_open_clip(ours, theirs, n, bias):
    """Values and gradients, within 1e-6."""
    out, twin = (output(n, 16, scale=30.0, bias=bias, dtype=torch.float64) for _ in range(2))
    loss = ours()(out, {})
    expected = theirs()(twin.image_features, twin.text_features, twin.logit_scale, logit_bias=twin.logit_bias)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    loss.backward()
    expected.backward()
    for x, y in zip(out, twin, strict=True):
        if x is not None:
            torch.testing.assert_close(x.grad, y.grad, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
def test_autocast_costs_no_digits(loss):
    """Close features at scale 100: under bf16 autocast the loss is float32's, where a bf16 product is off by 0.1."""
    noise = torch.randn(17, 64, generator=torch.Generator().manual_seed(0))
    near = F.normalize(noise[:1] + 0.1 * noise[1:], dim=-1)
    out = ClipOutput(near, near.flip(0), torch.tensor(100.0))
    exact = loss(out)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(out) == exact
        rounded = out.logit_scale * out.image_features @ out.text_features.T
    assert (rounded.float() - out.logit_scale * out.image_features @ out.text_features.T).abs().max() > 0.1
