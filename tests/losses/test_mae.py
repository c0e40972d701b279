"""The masked autoencoder's loss against a case worked out with NumPy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from medclip.losses.mae import MaeLoss, mae_loss

RNG = np.random.default_rng(0)
PREDICTION, TARGET = (RNG.normal(size=(1, 3, 5)).astype(np.float32) for _ in range(2))  # three masked patches of four


class Output(NamedTuple):
    prediction: Tensor
    target: Tensor


def test_by_hand():
    patches = [((PREDICTION[0, i] - TARGET[0, i]) ** 2).mean() for i in range(3)]
    out = Output(torch.from_numpy(PREDICTION), torch.from_numpy(TARGET))
    assert MaeLoss()(out, {}).item() == pytest.approx(np.mean(patches), abs=1e-6)


def test_normalised_by_the_patchs_own_mean_and_unbiased_variance():
    target = TARGET.astype(np.float64)
    target = (target - target.mean(-1, keepdims=True)) / np.sqrt(target.var(-1, ddof=1, keepdims=True) + 1e-6)
    out = Output(torch.from_numpy(PREDICTION), torch.from_numpy(TARGET))
    assert MaeLoss(normalise=True)(out, {}).item() == pytest.approx(((PREDICTION - target) ** 2).mean(), abs=1e-6)


def test_scaled_pixels_cost_nothing_when_normalised():
    target = torch.from_numpy(TARGET)
    prediction = torch.from_numpy(PREDICTION)
    bright = mae_loss(prediction, 30 * target + 7, normalise=True)
    assert bright.item() == pytest.approx(mae_loss(prediction, target, normalise=True).item(), rel=1e-4)


def test_half_precision_is_summed_in_single():
    """2048 + 1 is 2048 in bfloat16: a mean of so many squares must not be taken there."""
    ones = torch.ones(1, 64, 768, dtype=torch.bfloat16)
    assert mae_loss(ones, torch.zeros(1, 64, 768)).item() == pytest.approx(1.0)
