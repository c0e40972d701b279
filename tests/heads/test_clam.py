"""CLAM's slides and its instance loss, against loops over classes and patches."""

from __future__ import annotations

import math

import pytest
import torch

from medclip.heads.clam import Clam
from medclip.types import UserError
from tests.heads.bag_toys import CLASSES, DIM, all_real, bag_of, one_hot

K = 3


def clam(**options: object) -> Clam:
    torch.manual_seed(1)
    return Clam(DIM, CLASSES, k_sample=K, **options).double().eval()  # pyright: ignore


def loss_of(said: torch.Tensor, right: int, loss: str) -> float:
    a, b = said[right].item(), said[1 - right].item() + (1.0 if loss == "svm" else 0.0)
    return math.log(math.exp(a) + math.exp(b)) - a


@pytest.mark.parametrize("branches", ["one", "each"])
@pytest.mark.parametrize("loss", ["svm", "ce"])
@pytest.mark.parametrize("subtyping", [False, True])
def test_slides_and_instances_patch_by_patch(branches: str, loss: str, subtyping: bool) -> None:
    head = clam(branches=branches, instance_loss=loss, subtyping=subtyping)
    bag, right = bag_of(10), 1
    found = head(bag, all_real(bag), one_hot(right))
    h = head.embed(bag)[0]
    scores = head.scores(h[None])[0]
    total = 0.0
    for c in range(CLASSES):
        own = scores[c if branches == "each" else 0]
        slide = (own.exp() / own.exp().sum()) @ h
        expected = head.classifier.weight[c] @ slide + head.classifier.bias[c]
        torch.testing.assert_close(found.logits[0, c], expected)
        order = own.argsort(descending=True).tolist()
        said = h @ head.instances.weight[2 * c : 2 * c + 2].T + head.instances.bias[2 * c : 2 * c + 2]
        if c == right:
            terms = [loss_of(said[i], 1, loss) for i in order[:K]] + [loss_of(said[i], 0, loss) for i in order[-K:]]
            total += sum(terms) / len(terms)
        elif subtyping:
            total += sum(loss_of(said[i], 0, loss) for i in order[:K]) / K
    assert found.extra[0, 0].item() == pytest.approx(total / (CLASSES if subtyping else 1))


def test_several_classes_are_averaged_and_unknown_ones_left_out() -> None:
    head, bag = clam(branches="each"), bag_of(10)
    each = torch.stack([head(bag, all_real(bag), one_hot(c)).extra[0, 0] for c in range(CLASSES)])
    both = head(bag, all_real(bag), torch.tensor([[1.0, math.nan, 1.0]]).double()).extra[0, 0]
    torch.testing.assert_close(both, each[[0, 2]].mean())
    assert head(bag, all_real(bag), torch.zeros(1, CLASSES).double()).extra.item() == 0


def test_the_instance_loss_teaches_its_classifier_and_the_patches_not_the_attention() -> None:
    """Which patches are picked has no gradient, as published."""
    head, bag = clam(), bag_of(10)
    head(bag, all_real(bag), one_hot(2)).extra.sum().backward()
    assert head.instances.weight.grad is not None and (head.instances.weight.grad[4:] != 0).any()
    assert (head.instances.weight.grad[:4] == 0).all()  # of the classes that the slide does not have
    assert head.embed[0].weight.grad is not None and head.embed[0].weight.grad.abs().max() > 0  # pyright: ignore
    assert head.scores.score.weight.grad is None


def test_sizes_and_words() -> None:
    assert clam().scores.score.in_features == 256 and clam(size="big").scores.score.in_features == 384
    for wrong, line in (
        ({"size": "large"}, r"model\.head\.size=large is unknown: one of small, big"),
        ({"branches": "both"}, "one, each"),
        ({"instance_loss": "hinge"}, "svm, ce"),
        ({"k_sample": 0}, "k_sample is 0"),
    ):
        with pytest.raises(UserError, match=line):
            Clam(DIM, CLASSES, **wrong)  # pyright: ignore
