"""The remembering encoder gives the encoder's own features, and asks it once for each distinct input."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from medclip.infer.memory import Remembering
from medclip.types import DualEncoder, Preprocess


class Flat:
    preprocess = Preprocess()
    tokenizer = None
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.asked: list[int] = []

    def encode_image(self, image: Tensor) -> Tensor:
        self.asked.append(len(image))
        return normalize(image.flatten(1).float() + 1, dim=-1)

    encode_text = encode_image


def test_each_distinct_row_is_embedded_once() -> None:
    flat = Flat()
    memory = Remembering(flat)  # type: ignore[arg-type]
    rows = torch.randint(0, 255, (5, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    first = rows[[0, 1, 0, 2]]
    torch.testing.assert_close(memory.encode_image(first), Flat().encode_image(first))
    second = rows[[4, 2, 3, 4, 1]]
    torch.testing.assert_close(memory.encode_image(second), Flat().encode_image(second))
    assert flat.asked == [3, 2]
    assert isinstance(memory, DualEncoder)
    forgetful = Remembering(flat, images=False)  # type: ignore[arg-type]
    torch.testing.assert_close(forgetful.encode_image(first), Flat().encode_image(first))
    assert flat.asked == [3, 2, 4]


def test_equal_bytes_of_another_shape_or_type_are_another_input() -> None:
    flat = Flat()
    memory = Remembering(flat)  # type: ignore[arg-type]
    memory.encode_image(torch.zeros(1, 3, 2, 4, dtype=torch.uint8))
    memory.encode_image(torch.zeros(1, 3, 4, 2, dtype=torch.uint8))
    memory.encode_image(torch.zeros(1, 3, 2, 2, dtype=torch.int16))
    memory.encode_text(torch.zeros(1, 3, 2, 4, dtype=torch.uint8))
    assert flat.asked == [1, 1, 1, 1]


def test_bf16_runs_the_towers_under_autocast_and_gives_float32_back() -> None:
    class Tower(Flat):
        def encode_image(self, image: Tensor) -> Tensor:
            self.kind = (image.flatten(1).float() @ torch.eye(12)).dtype
            return normalize(image.flatten(1).float() @ torch.eye(12), dim=-1)

    rows = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 2, 2)
    for precision, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        tower = Tower()
        found = Remembering(tower, precision).encode_image(rows)  # type: ignore[arg-type]
        assert tower.kind == kind and found.dtype == torch.float32


def test_large_batches_go_through_the_tower_in_pieces_and_come_back_whole() -> None:
    flat = Flat()
    rows = torch.randint(0, 255, (50, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = Remembering(flat).encode_image(rows)  # type: ignore[arg-type]
    assert sum(flat.asked) == 50 and max(flat.asked) * 3 * 224 * 224 * 4 <= 32 << 20
    torch.testing.assert_close(found, Flat().encode_image(rows))
