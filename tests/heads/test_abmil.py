"""ABMIL, mean and max against their formulas, patch by patch."""

from __future__ import annotations

import pytest
import torch

from medclip.heads.abmil import Abmil
from medclip.heads.pool import MaxPool, MeanPool
from tests.heads.bag_toys import CLASSES, DIM, all_real, bag_of, head_of


@pytest.mark.parametrize("gated", [True, False])
def test_abmil_is_equations_7_to_9(gated: bool) -> None:
    head = Abmil(DIM, CLASSES, hidden=8, attention=6, gated=gated).double()
    bag = bag_of(5)
    w = dict(head.named_parameters())
    hidden, scores = [], []
    for x in bag[0]:
        h = (w["embed.0.weight"] @ x + w["embed.0.bias"]).clamp(min=0)
        inner = (w["scores.value.0.weight"] @ h + w["scores.value.0.bias"]).tanh()
        if gated:
            inner = inner / (1 + (-(w["scores.gate.0.weight"] @ h + w["scores.gate.0.bias"])).exp())
        hidden.append(h)
        scores.append((w["scores.score.weight"] @ inner + w["scores.score.bias"]).item())
    powers = torch.tensor(scores).double().exp()
    shares = powers / powers.sum()
    slide = torch.stack([a * h for a, h in zip(shares, hidden, strict=True)]).sum(0)
    found = head(bag, all_real(bag))
    torch.testing.assert_close(found.attention[0, 0], shares, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.slide[0], slide, atol=1e-6, rtol=1e-5)
    logits = w["classifier.1.weight"] @ slide + w["classifier.1.bias"]
    torch.testing.assert_close(found.logits[0], logits, atol=1e-6, rtol=1e-5)


def test_abmil_whose_scores_are_all_the_same_is_mean_pooling() -> None:
    head, mean = head_of("abmil").eval(), head_of("mean").eval()
    mean.embed.load_state_dict(head.embed.state_dict())  # pyright: ignore
    mean.classifier.load_state_dict(head.classifier[1].state_dict())  # pyright: ignore
    torch.nn.init.zeros_(head.scores.score.weight)  # pyright: ignore
    bag = bag_of(13)
    torch.testing.assert_close(head(bag, all_real(bag)).logits, mean(bag, all_real(bag)).logits)


def test_mean_and_max_are_those_of_the_patches_logits() -> None:
    bag = bag_of(7, 2)
    for made, pool in ((MeanPool, lambda x: x.mean(1)), (MaxPool, lambda x: x.amax(1))):
        head = made(DIM, CLASSES, hidden=8).double().eval()
        each = head.classifier(head.embed(bag))
        torch.testing.assert_close(head(bag, all_real(bag)).logits, pool(each))


def test_the_patch_of_maximal_attention_is_the_one_that_max_takes() -> None:
    head = head_of("max").eval()
    bag = bag_of(9)
    found = head(bag, all_real(bag))
    for output, patch in enumerate(found.attention[0].argmax(1)):
        alone = bag[:, patch : patch + 1]
        torch.testing.assert_close(head(alone, all_real(alone)).logits[0, output], found.logits[0, output])


def test_dropout_is_at_work_in_training_alone() -> None:
    bag = bag_of(9)
    head = head_of("abmil", dropout=0.5)
    assert not torch.equal(*(head(bag, all_real(bag)).logits for _ in range(2)))
    head.eval()
    assert torch.equal(*(head(bag, all_real(bag)).logits for _ in range(2)))
