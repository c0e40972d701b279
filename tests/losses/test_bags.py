"""Losses of slides: by hand, against torch's own, by finite differences, and what censoring and missing labels do."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medclip.losses.bag_classes import BagClassesLoss, bag_classes_loss
from medclip.losses.bag_multilabel import BagMultilabelLoss
from medclip.losses.bag_ordinal import BagOrdinalLoss
from medclip.losses.bce import bce_loss
from medclip.losses.cox import CoxLoss, cox_loss
from medclip.losses.extra import ExtraLoss
from medclip.losses.survival import SurvivalLoss, survival_loss
from medclip.types import UserError


class Out(NamedTuple):
    logits: Tensor
    extra: Tensor


def out(logits: Tensor, extra: Tensor | None = None) -> Out:
    return Out(logits, torch.empty(len(logits), 0) if extra is None else extra)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- classes ----------------------------------------------------------------------------------------------------------


def test_classes_are_torchs_cross_entropy_with_smoothing() -> None:
    logits, index = drawn(6, 4), torch.tensor([0, 3, 1, 1, 2, 0])
    label = F.one_hot(index, 4).double()
    for smoothing in (0.0, 0.2):
        ours = bag_classes_loss(logits, label, smoothing=smoothing)
        torch.testing.assert_close(ours, F.cross_entropy(logits, index, label_smoothing=smoothing), rtol=1e-12, atol=0)


def test_a_class_weight_counts_with_one_bag_a_step() -> None:
    """Where torch's own, which divides by the batch's weights, has none left."""
    logits, label = torch.tensor([[0.2, -0.4]]), torch.tensor([[0.0, 1.0]])
    plain = BagClassesLoss()(out(logits), {"label": label})
    weighed = BagClassesLoss([1, 5])(out(logits), {"label": label})
    assert weighed.item() == pytest.approx(5 * plain.item(), rel=1e-6)
    assert F.cross_entropy(logits, torch.tensor([1]), weight=torch.tensor([1.0, 5.0])).item() == pytest.approx(
        plain.item(), rel=1e-6
    )


def test_balanced_classes_count_alike_over_the_data() -> None:
    """Of 30 slides of class 0 and 10 of class 1, all unsure, each class has half of the weight; the mean stays."""
    loss = BagClassesLoss("balanced")
    with pytest.raises(UserError, match="balanced needs data"):
        loss(out(torch.zeros(1, 2)), {"label": torch.eye(2)[:1]})
    loss.balance([30, 10], [10, 30])
    costs = [loss(out(torch.zeros(1, 2)), {"label": torch.eye(2)[k : k + 1]}).item() for k in (0, 1)]
    assert 30 * costs[0] == pytest.approx(10 * costs[1])
    assert (30 * costs[0] + 10 * costs[1]) / 40 == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    "loss", [BagClassesLoss(), BagOrdinalLoss(), BagMultilabelLoss()], ids=lambda x: type(x).__name__
)
def test_an_unknown_label_teaches_nothing(loss: torch.nn.Module) -> None:
    logits = drawn(3, 2).requires_grad_()
    label = torch.tensor([[1.0, 0.0], [math.nan, math.nan], [0.0, 1.0]])
    if isinstance(loss, BagOrdinalLoss):
        label[2] = 1
    grad = torch.autograd.grad(loss(out(logits), {"label": label}), logits)[0]
    assert grad.isfinite().all() and (grad[1] == 0).all() and (grad[[0, 2]] != 0).all()
    kept = [0, 2]
    found, alone = loss(out(logits), {"label": label}), loss(out(logits[kept]), {"label": label[kept]})
    assert found.item() == pytest.approx(alone.item(), rel=1e-12)
    nothing = loss(out(logits[1:2]), {"label": label[1:2]})
    assert nothing.item() == 0 and (torch.autograd.grad(nothing, logits)[0] == 0).all()


def test_a_model_of_another_target_is_one_line() -> None:
    with pytest.raises(UserError, match="3 labels each, the model 2 outputs"):
        BagClassesLoss()(out(torch.zeros(1, 2)), {"label": torch.eye(3)[:1]})
    with pytest.raises(UserError, match=r"no labels: say data\.target"):
        BagOrdinalLoss()(out(torch.zeros(1, 2)), {})
    with pytest.raises(UserError, match="3 class weights for 2 classes"):
        BagClassesLoss([1, 2, 3])(out(torch.zeros(1, 2)), {"label": torch.eye(2)[:1]})
    with pytest.raises(UserError, match="give a number above 0 a class"):
        BagClassesLoss([1, 0])
    with pytest.raises(UserError, match="give a number above 0 a class"):
        BagMultilabelLoss("even")


def test_half_precision_is_left_before_the_logarithm() -> None:
    logits = torch.tensor([[6.25, 0.0]], dtype=torch.bfloat16)
    found = BagClassesLoss()(out(logits), {"label": torch.tensor([[1.0, 0.0]])})
    assert found.dtype == torch.float32 and found.item() == pytest.approx(math.log1p(math.exp(-6.25)), abs=1e-6)


# --- grades and findings ----------------------------------------------------------------------------------------------


def test_grades_by_hand() -> None:
    """Grade 1 of 0, 1, 2: above 0, and not above 1."""
    found = BagOrdinalLoss()(out(torch.tensor([[0.7, -0.3]])), {"label": torch.tensor([[1.0, 0.0]])})
    assert found.item() == pytest.approx(math.log1p(math.exp(-0.7)) + math.log1p(math.exp(-0.3)), abs=1e-6)


def test_a_further_grade_costs_more() -> None:
    logits = torch.tensor([[4.0, 4.0, 4.0]])  # sure of the highest
    costs = [
        BagOrdinalLoss()(out(logits), {"label": (torch.arange(3) < grade).float()[None]}).item()
        for grade in (3, 2, 1, 0)
    ]
    assert all(less < more for less, more in pairwise(costs))


def test_findings_are_the_loss_of_findings() -> None:
    logits, label = drawn(4, 3), torch.tensor([[1.0, 0, math.nan], [0, 1, 1], [1, 1, 0], [0, math.nan, 0]])
    expected = bce_loss(logits, label, torch.tensor([2.0, 1.0, 3.0]))
    assert BagMultilabelLoss([2, 1, 3])(out(logits), {"label": label}).item() == pytest.approx(
        expected.item(), rel=1e-12
    )
    loss = BagMultilabelLoss("balanced")
    loss.balance([1, 2, 0], [2, 2, 4])
    assert loss.pos_weight is not None and loss.pos_weight.tolist() == [2, 1, 1]


# --- survival ---------------------------------------------------------------------------------------------------------

TIMES = torch.tensor([5.0, 2.0, 2.0, 7.0, 3.0, 1.0], dtype=torch.float64)
EVENTS = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64)


def breslow(risk: Tensor, time: Tensor, event: Tensor) -> float:
    """Event by event, risk set by risk set."""
    total = 0.0
    for i in range(len(risk)):
        if event[i]:
            there = sum(math.exp(risk[j]) for j in range(len(risk)) if time[j] >= time[i])
            total += math.log(there) - risk[i].item()
    return total / event.sum().item()


def test_cox_is_breslows_likelihood() -> None:
    risk = drawn(6)
    assert cox_loss(risk, TIMES, EVENTS).item() == pytest.approx(breslow(risk, TIMES, EVENTS), rel=1e-12)
    tied = torch.tensor([2.0, 2, 2, 2, 4, 4], dtype=torch.float64)
    assert cox_loss(risk, tied, EVENTS).item() == pytest.approx(breslow(risk, tied, EVENTS), rel=1e-12)
    # By hand: of two, the first to go among both, the last among itself.
    two = cox_loss(torch.tensor([0.3, -0.1]), torch.tensor([1.0, 2.0]), torch.ones(2))
    assert two.item() == pytest.approx((math.log1p(math.exp(-0.4)) + 0) / 2, rel=1e-6)


def test_cox_has_its_gradient() -> None:
    assert torch.autograd.gradcheck(lambda risk: cox_loss(risk, TIMES, EVENTS), (drawn(6).requires_grad_(),))


def test_cox_sees_the_order_of_times_alone_and_no_shift_of_risks() -> None:
    risk = drawn(6)
    first = cox_loss(risk, TIMES, EVENTS)
    torch.testing.assert_close(cox_loss(risk + 100, TIMES.exp(), EVENTS), first)
    assert cox_loss(risk, TIMES, torch.zeros(6)).item() == 0


def test_cox_leaves_out_who_was_never_followed() -> None:
    risk, time = drawn(7), torch.cat([TIMES, torch.tensor([math.nan])])
    event = torch.cat([EVENTS, torch.ones(1)])
    assert cox_loss(risk, time, event).item() == pytest.approx(cox_loss(risk[:6], TIMES, EVENTS).item(), rel=1e-12)


def test_cox_teaches_the_order() -> None:
    risk = torch.zeros(6, requires_grad=True)
    for _ in range(200):
        grad = torch.autograd.grad(cox_loss(risk, TIMES, torch.ones(6)), risk)[0]
        risk = (risk - grad).detach().requires_grad_()
    assert int(risk.argmax()) == 5 and int(risk.argmin()) == 3


def test_cox_of_a_batch() -> None:
    batch = {"time": TIMES, "event": EVENTS}
    with pytest.raises(UserError, match="one risk a slide, the model has 4 outputs"):
        CoxLoss()(out(drawn(6, 4)), batch)
    with pytest.raises(UserError, match=r"no times of events: say data\.target=survival"):
        CoxLoss()(out(drawn(6, 1)), {"label": torch.zeros(6, 1)})
    assert CoxLoss()(out(drawn(6, 1)), batch).item() == pytest.approx(
        breslow(drawn(6, 1)[:, 0], TIMES, EVENTS), rel=1e-6
    )


def by_product(logits: Tensor, bins: list[int], event: list[float]) -> float:
    """-log of the chance of what was seen, multiplied out interval by interval."""
    total = 0.0
    for row, last, seen in zip(logits.sigmoid(), bins, event, strict=True):
        chance = 1.0
        for k in range(last):
            chance *= 1 - row[k].item()
        chance *= row[last].item() if seen else 1 - row[last].item()
        total -= math.log(chance)
    return total / len(bins)


def test_hazards_are_the_likelihood_multiplied_out() -> None:
    logits, bins, event = drawn(5, 4), [0, 3, 2, 0, 3], [1.0, 1, 0, 0, 0]
    label = F.one_hot(torch.tensor(bins), 4).double()
    found = survival_loss(logits, label, torch.tensor(event).double())
    assert found.item() == pytest.approx(by_product(logits, bins, event), rel=1e-10)
    assert torch.autograd.gradcheck(
        lambda x: survival_loss(x, label, torch.tensor(event).double(), 0.3), (logits.requires_grad_(),)
    )


def test_one_interval_that_none_lives_through_is_a_classification() -> None:
    """Of two intervals, with all events seen in one of them, the first hazard is a class, and the last one certain."""
    logits, label = drawn(4, 2), F.one_hot(torch.tensor([0, 1, 1, 0]), 2).double()
    logits[:, 1] = 40
    expected = F.binary_cross_entropy_with_logits(logits[:, 0], label[:, 0])
    assert survival_loss(logits, label, torch.ones(4)).item() == pytest.approx(expected.item(), rel=1e-6)


def test_alpha_takes_the_censored_out() -> None:
    logits, label = drawn(4, 3), F.one_hot(torch.tensor([0, 2, 1, 1]), 3).double()
    event = torch.tensor([1.0, 0, 1, 0])
    seen = survival_loss(logits[[0, 2]], label[[0, 2]], torch.ones(2))
    assert SurvivalLoss(1.0)(out(logits), {"label": label, "event": event, "time": event}).item() == pytest.approx(
        seen.item() / 2, rel=1e-12
    )
    with pytest.raises(UserError, match="alpha is 2"):
        SurvivalLoss(2)


def test_an_extreme_hazard_stays_finite() -> None:
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    loss = survival_loss(logits, torch.tensor([[0.0, 1.0]]), torch.ones(1))
    grad = torch.autograd.grad(loss, logits)[0]
    assert loss.item() == pytest.approx(400) and grad.tolist() == [[1.0, -1.0]]


# --- the head's own ---------------------------------------------------------------------------------------------------


def test_extra_losses_are_weighed_and_averaged() -> None:
    extra = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
    made = out(torch.zeros(2, 2), extra)
    assert ExtraLoss()(made, {}).item() == 22
    assert ExtraLoss([1, 0.1])(made, {}).item() == pytest.approx(4)
    assert ExtraLoss()(out(torch.zeros(2, 2)), {}).item() == 0
    with pytest.raises(UserError, match="1 weights for the 2 losses"):
        ExtraLoss([1.0])(made, {})
