"""Remembered features: each distinct image is seen once, the bits do not depend on the batch, and memory ends."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medclip.models.remembered import Remembered


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 200), nn.GELU(), nn.Linear(200, 7)).eval()


def images(n: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def ask(memory: Remembered, net: nn.Module, rows: Tensor, *more: Tensor) -> Tensor:
    return memory([rows, *more], lambda row: net(rows[row : row + 1].float() / 255).unsqueeze(1))


def test_a_distinct_image_is_seen_once_wherever_it_comes(net: nn.Module) -> None:
    memory, pool = Remembered(10**6), images(9)
    for order in ([0, 1, 1, 2], [2, 0, 3, 3], [8, 7, 6, 5, 4, 0]):
        found = ask(memory, net, pool[order])
        torch.testing.assert_close(found, net(pool[order].float() / 255).unsqueeze(1))
    assert (memory.made, len(memory)) == (9, 9)


def test_one_bit_anywhere_makes_another_image(net: nn.Module) -> None:
    memory, image = Remembered(10**6), images(1)
    ask(memory, net, image)
    flat = image.flatten()
    for place in range(0, flat.numel(), 97):
        for bit in (1, 128):
            other = flat.clone()
            other[place] ^= bit
            before = memory.made
            ask(memory, net, other.view_as(image))
            assert memory.made == before + 1
    swapped = image.flip(3)
    before = memory.made
    ask(memory, net, swapped)
    assert memory.made == before + 1


def test_statistics_of_a_row_are_part_of_it(net: nn.Module) -> None:
    memory, image = Remembered(10**6), images(1)
    for mean in (0.5, 0.4, 0.5):
        ask(memory, net, image, torch.full((1, 3), mean))
    assert memory.made == 2


def test_the_bits_do_not_depend_on_the_batch(net: nn.Module) -> None:
    pool = images(40)
    one, other = Remembered(10**6), Remembered(10**6)
    whole = ask(one, net, pool)
    parts = torch.cat([ask(other, net, part) for part in pool.flip(0).split([1, 2, 4, 33])]).flip(0)
    assert torch.equal(whole, parts)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ask(Remembered(10**6), net, pool), whole)


def test_memory_ends_and_says_so(net: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    memory, pool = Remembered(5 * 7 * 4), images(8)  # five rows of seven floats
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            torch.testing.assert_close(ask(memory, net, pool), net(pool.float() / 255).unsqueeze(1))
    assert len(memory) == 5 and memory.bytes == 5 * 7 * 4
    assert memory.made == 8 + 3
    assert [r.message for r in caplog.records if "remember" in r.message] == [caplog.records[0].message]
    assert "room for the features of 5 images" in caplog.text


def test_what_validation_remembered_training_can_add_to(net: nn.Module) -> None:
    memory, pool = Remembered(10**6), images(100)
    with torch.inference_mode():
        ask(memory, net, pool[:3])
    head: Any = nn.Linear(7, 1)
    head(ask(memory, net, pool)).sum().backward()  # the memory grows, and its rows are saved for the backward pass
    assert head.weight.grad.abs().sum() > 0
    assert memory.made == 100
