"""Answer losses against torch's own on each branch, and what is nobody's adds nothing."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medclip.losses.answers import AnswersLoss, ChoiceLoss, TypesLoss
from medclip.losses.drawn import DrawnLoss
from medclip.types import UserError

N, CLOSED, ANSWERS = 6, 2, 5


class Out(NamedTuple):
    logits: Tensor
    own: Tensor
    closed: Tensor
    drawn: Tensor = torch.zeros(N)


def out(closed_rows: list[int], open_rows: list[int]) -> tuple[Out, dict]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(N, ANSWERS, generator=generator, requires_grad=True)
    own, label = torch.zeros(N, ANSWERS, dtype=torch.bool), torch.zeros(N, ANSWERS)
    own[closed_rows, :CLOSED] = True
    own[open_rows, CLOSED:] = True
    label[closed_rows, 1] = 1
    label[open_rows, 3] = 1
    return Out(logits, own, torch.linspace(-2, 2, N)), {"label": label}


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("rows", [([0, 3], [1, 2, 5]), ([], [0, 1]), ([2], []), ([], [])], ids=str)
def test_branches_are_torchs_loss_each(rows: tuple[list[int], list[int]], reduction: str):
    found, batch = out(*rows)
    expected = torch.zeros(())
    for own, columns in zip(rows, (slice(0, CLOSED), slice(CLOSED, ANSWERS)), strict=True):
        if own:
            part = found.logits[own][:, columns], batch["label"][own][:, columns]
            loss = F.binary_cross_entropy_with_logits(*part, reduction=reduction)
            expected = expected + (loss / len(own) if reduction == "sum" else loss)
    loss = AnswersLoss(reduction)(found, batch)  # type: ignore[arg-type]
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert found.logits.grad is not None
    assert (found.logits.grad[~found.own] == 0).all() and found.logits.grad.isfinite().all()


def test_one_vocabulary_is_the_plain_loss():
    found, batch = out([], [])
    found = found._replace(own=torch.ones(N, ANSWERS, dtype=torch.bool))
    plain = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(AnswersLoss("mean")(found, batch), plain(found.logits, batch["label"]))
    summed = plain(found.logits, batch["label"], reduction="sum") / N
    torch.testing.assert_close(AnswersLoss("sum")(found, batch), summed)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_choice_is_torchs_cross_entropy_within_the_branch(smoothing: float):
    found, batch = out([0, 3], [1, 2, 5])
    of = F.cross_entropy
    one = of(found.logits[[0, 3], :CLOSED], torch.tensor([1, 1]), label_smoothing=smoothing, reduction="sum")
    two = of(found.logits[[1, 2, 5], CLOSED:], torch.tensor([1] * 3), label_smoothing=smoothing, reduction="sum")
    loss = ChoiceLoss(smoothing)(found, batch)  # type: ignore[arg-type]
    torch.testing.assert_close(loss, (one + two) / 5)
    loss.backward()
    assert found.logits.grad is not None and found.logits.grad.isfinite().all()
    nobody, batch = out([], [])
    assert ChoiceLoss()(nobody, batch) == 0  # type: ignore[arg-type]


def test_types_are_learnt_from_rows_of_a_known_type():
    found, batch = out([0, 3], [1, 2])
    known = found.closed[:4]
    expected = F.binary_cross_entropy_with_logits(known, torch.tensor([1.0, 0, 0, 1]))
    torch.testing.assert_close(TypesLoss()(found, batch), expected)
    assert TypesLoss()(found._replace(closed=torch.full((N,), torch.nan)), batch) == 0


def test_drawn_and_refusals():
    found, _ = out([0], [1])
    assert DrawnLoss()(found._replace(drawn=torch.arange(6.0)), {}) == 2.5  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the data have no answers"):
        AnswersLoss()(found, {})
    with pytest.raises(UserError, match="reduction is 'max'"):
        AnswersLoss("max")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"smoothing is 1\.0"):
        ChoiceLoss(1.0)
