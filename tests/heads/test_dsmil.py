"""DSMIL against its formulas, patch by patch and output by output."""

from __future__ import annotations

import pytest
import torch

from medclip.heads.dsmil import Dsmil
from tests.heads.bag_toys import CLASSES, DIM, all_real, bag_of


@pytest.mark.parametrize("values", [False, True])
def test_both_streams(values: bool) -> None:
    torch.manual_seed(0)
    head = Dsmil(DIM, CLASSES, query=4, values=values).double().eval()
    bag = bag_of(7)
    found = head(bag, all_real(bag))
    x = bag[0]
    v = x if head.value is None else (x @ head.value[1].weight.T + head.value[1].bias).clamp(min=0)  # pyright: ignore
    scores = x @ head.instance.weight.T + head.instance.bias
    first, second = head.query[0], head.query[2]
    q = ((x @ first.weight.T + first.bias).clamp(min=0) @ second.weight.T + second.bias).tanh()  # pyright: ignore
    slides = []
    for c in range(CLASSES):
        critical = max(range(7), key=lambda i: scores[i, c].item())
        powers = torch.stack([((q[i] @ q[critical]) / 4**0.5).exp() for i in range(7)])
        torch.testing.assert_close(found.attention[0, c], powers / powers.sum())
        slides.append((powers / powers.sum()) @ v)
    bag_logits = head.classifier.weight @ torch.cat(slides) + head.classifier.bias
    torch.testing.assert_close(found.logits[0], (scores.amax(0) + bag_logits) / 2)
    torch.testing.assert_close(found.slide[0], torch.stack(slides).mean(0))


def test_queries_of_zero_make_the_second_stream_mean_pooling() -> None:
    head = Dsmil(DIM, CLASSES, query=4, nonlinear=False).double()
    torch.nn.init.zeros_(head.query[0].weight)  # pyright: ignore
    bag = bag_of(7)
    torch.testing.assert_close(head(bag, all_real(bag)).slide, bag.mean(1))
