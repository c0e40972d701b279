"""ACMIL: its limits, its masking, and the losses of its branches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from medclip.heads.abmil import Abmil
from medclip.heads.acmil import Acmil, alike
from medclip.types import UserError
from tests.heads.bag_toys import CLASSES, DIM, all_real, bag_of, one_hot


def acmil(**options: Any) -> Acmil:
    torch.manual_seed(0)
    return Acmil(DIM, CLASSES, **dict[str, Any](hidden=8, attention=6, tokens=3, masked=0) | options).double()


def test_one_token_without_masking_is_abmil_in_training_too() -> None:
    head, bag = acmil(tokens=1), bag_of(30, 2)
    plain = Abmil(DIM, CLASSES, hidden=8, attention=6).double()
    plain.load_state_dict(head.state_dict())  # the very parameters, by name
    ours, theirs = head(bag, all_real(bag), one_hot(0, 1)), plain(bag, all_real(bag))
    assert (ours.extra == 0).all()
    for field in ("logits", "attention", "slide"):
        torch.testing.assert_close(getattr(ours, field), getattr(theirs, field), atol=1e-12, rtol=0)


def test_the_slide_is_of_the_mean_attention_and_branches_are_of_each() -> None:
    head, bag = acmil(), bag_of(9)
    found = head(bag, all_real(bag), one_hot(1))
    h = head.embed(bag)[0]
    torch.testing.assert_close(found.slide[0], found.attention[0].to(h.dtype).mean(0) @ h)
    torch.testing.assert_close(found.logits[0], head.classifier(found.slide)[0])
    losses = [
        -branch(found.attention[:, t].to(h.dtype) @ h).log_softmax(1)[0, 1] for t, branch in enumerate(head.branches)
    ]
    torch.testing.assert_close(found.extra[0, 0], torch.stack(losses).mean())


def test_diversity_is_the_mean_cosine_over_pairs() -> None:
    a = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.5, 0.5, 0.0]]])
    assert alike(a).item() == pytest.approx((0 + math.sqrt(0.5) + math.sqrt(0.5)) / 3)
    head, bag = acmil(), bag_of(9)
    torch.nn.init.zeros_(head.scores.score.weight)
    torch.nn.init.zeros_(head.scores.score.bias)
    assert head(bag, all_real(bag)).extra[0, 1].item() == pytest.approx(1.0)  # all tokens look at all patches alike


@pytest.mark.parametrize(
    ("patches", "masked", "rate", "taken"), [(40, 10, 0.6, 6), (40, 5, 0.5, 2), (4, 10, 0.6, 2), (1, 10, 0.9, 0)]
)
def test_masking_takes_a_share_of_the_highest_patches_at_random(
    patches: int, masked: int, rate: float, taken: int
) -> None:
    head, bag = acmil(masked=masked, rate=rate), bag_of(patches)
    highest = head.eval()(bag, all_real(bag)).attention.topk(min(masked, patches), 2).indices
    head.train()
    out = torch.stack([head(bag, all_real(bag)).attention[0] == 0 for _ in range(60)])
    assert (out.sum(2) == taken).all()
    for token in range(3):
        rate_of = out[:, token].double().mean(0)
        others = torch.ones(patches, dtype=torch.bool)
        others[highest[0, token]] = False
        assert (rate_of[others] == 0).all()
        if taken:  # each of the highest has its turn
            assert ((rate_of[~others] > 0) & (rate_of[~others] < 1)).all()
    real = all_real(bag)
    assert (head.eval()(bag, real).attention > 0).all()  # in training alone


def test_padding_is_not_masked_in_the_place_of_patches() -> None:
    head = acmil(masked=10, rate=0.6).train()
    bag, real = bag_of(40), torch.zeros(1, 40, dtype=torch.bool)
    real[0, :5] = True
    attention = head(bag, real).attention[0]
    assert ((attention[:, :5] > 0).sum(1) == 2).all()  # 3 of the 5 are out


def corn(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """-log P(y) of three grades of which each is reached from the one before."""
    first, second = z.sigmoid()
    grade = int(y.sum())
    return -(1 - first, first * (1 - second), first * second)[grade].log()


@pytest.mark.parametrize(
    ("target", "label", "expected"),
    [
        ("ordinal", [0.0, 0.0], corn),
        ("ordinal", [1.0, 0.0], corn),
        ("ordinal", [1.0, 1.0], corn),
        ("multilabel", [1.0, 0.0], lambda z, y: F.binary_cross_entropy_with_logits(z, y)),
        ("multilabel", [math.nan, 0.0], lambda z, y: F.softplus(z[1])),
        ("survival", [1.0, 0.0], lambda z, y: z.sum() * 0),
    ],
)
def test_branches_of_other_targets(
    target: str, label: list[float], expected: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> None:
    torch.manual_seed(0)
    head = Acmil(DIM, 2, hidden=8, attention=6, tokens=2, masked=0, target=target).double()  # pyright: ignore
    bag, y = bag_of(9), torch.tensor(label).double()
    found = head(bag, all_real(bag), y[None])
    slides = found.attention[0].double() @ head.embed(bag)[0]
    losses = [expected(branch(slides[t]), y) for t, branch in enumerate(head.branches)]
    torch.testing.assert_close(found.extra[0, 0], torch.stack(losses).mean())
    found.extra.sum().backward()
    assert all(weight.grad is not None for weight in head.branches.parameters())


def test_options_that_make_no_sense() -> None:
    for wrong, line in (({"tokens": 0}, "tokens is 0"), ({"rate": 1.0}, "a share below 1"), ({"masked": -1}, "0 or")):
        with pytest.raises(UserError, match=line):
            acmil(**wrong)
