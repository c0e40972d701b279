"""Cross entropy of several findings, by hand, and with unknown labels."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from medclip.losses.bce import BceLoss, bce_loss
from medclip.types import UserError

NAN = math.nan
LOGITS = torch.tensor([[0.3, -1.2], [2.0, 0.4]])


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_by_hand_with_an_unknown_label():
    label = torch.tensor([[1.0, 0.0], [NAN, 1.0]])
    expected = (softplus(-0.3) + softplus(-1.2) + softplus(-0.4)) / 3
    assert BceLoss()(LOGITS, {"label": label}).item() == pytest.approx(expected, abs=1e-6)
    weighted = (5 * softplus(-0.3) + softplus(-1.2) + 2 * softplus(-0.4)) / 3
    assert BceLoss(pos_weight=[5, 2])(LOGITS, {"label": label}).item() == pytest.approx(weighted, abs=1e-6)


def test_balanced_weighs_by_negatives_over_positives():
    """One positive of five, three of four, none of four: weights 4, 1/3, and 1 where the ratio means nothing."""
    loss = BceLoss("balanced")
    logits, label = torch.tensor([[0.3, -1.2, 0.5]]), torch.tensor([[1.0, 1.0, 0.0]])
    with pytest.raises(UserError, match="balanced needs data"):
        loss(logits, {"label": label})
    loss.balance([1, 3, 0], [4, 1, 4])
    expected = (4 * softplus(-0.3) + softplus(1.2) / 3 + softplus(0.5)) / 3
    assert loss(logits, {"label": label}).item() == pytest.approx(expected, abs=1e-6)


def test_all_known_is_torchs_own():
    logits, label = torch.randn(7, 14), torch.randint(0, 2, (7, 14)).float()
    assert bce_loss(logits, label).item() == pytest.approx(F.binary_cross_entropy_with_logits(logits, label).item())


def test_unknown_labels_give_no_gradient():
    logits = LOGITS.clone().requires_grad_()
    bce_loss(logits, torch.tensor([[NAN, 0.0], [NAN, NAN]])).backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0, pytest.approx(1 / (1 + math.exp(1.2)))], [0, 0]]


def test_nothing_known_teaches_nothing():
    logits = LOGITS.clone().requires_grad_()
    loss = bce_loss(logits, torch.full((2, 2), NAN))
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None and not logits.grad.any()


def test_wrong_words():
    with pytest.raises(UserError, match=r"data\.labels"):
        BceLoss()(LOGITS, {})
    with pytest.raises(UserError, match="'balance': give a number a class"):
        BceLoss("balance")
    with pytest.raises(UserError, match="3 class weights for 2 classes"):
        BceLoss(pos_weight=[1, 1, 1])(LOGITS, {"label": torch.zeros(2, 2)})
