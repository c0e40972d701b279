"""TransMIL: Nyström attention against softmax attention and its own matrices, PPEG against three convolutions."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from medclip.heads import pooled
from medclip.heads.nystrom import NystromLayer, pinv
from medclip.heads.transmil import Ppeg, TransMil
from medclip.types import UserError
from tests.heads.bag_toys import CLASSES, DIM, all_real, bag_of

WIDTH, HEADS = 8, 2


def layer(landmarks: int, **options: object) -> NystromLayer:
    torch.manual_seed(0)
    return NystromLayer(WIDTH, heads=HEADS, landmarks=landmarks, **options).double().eval()  # pyright: ignore


def rows(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed)).double()


def projected(made: NystromLayer, x: torch.Tensor) -> list[torch.Tensor]:
    """q (scaled), k, v, each (heads, n, d)."""
    q, k, v = (y.view(len(x), HEADS, -1).transpose(0, 1) for y in made.qkv(made.norm(x)).chunk(3, 1))
    return [q / (WIDTH / HEADS) ** 0.5, k, v]


def finished(made: NystromLayer, x: torch.Tensor, attended: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The convolution added row by row, then the last projection and the residual."""
    kernel = made.near.weight[:, 0, :, 0]  # (heads, 33)
    near = torch.zeros_like(v)
    for i in range(len(x)):
        for j in range(max(0, i - 16), min(len(x), i + 17)):
            near[:, i] += kernel[:, j - i + 16, None] * v[:, j]
    return x + made.out((attended + near).transpose(0, 1).reshape(len(x), WIDTH))


@pytest.mark.parametrize("n", [1, 5, 40])
def test_no_more_rows_than_landmarks_is_softmax_attention(n: int) -> None:
    made, x = layer(40), rows(n)
    q, k, v = projected(made, x)
    expected = finished(made, x, F.scaled_dot_product_attention(q, k, v, scale=1.0), v)
    torch.testing.assert_close(made(x), expected)
    first, share = made.first(x)
    torch.testing.assert_close(first, expected[0])
    torch.testing.assert_close(share, (q[:, :1] @ k.transpose(1, 2)).softmax(2).mean((0, 1)))


@pytest.mark.parametrize("paper", [None, "paper"])
@pytest.mark.parametrize("n", [24, 23])
def test_nystrom_attention_is_its_three_matrices(n: int, paper: str | None) -> None:
    m = 6
    made, x = layer(m, compat=paper), rows(n)
    q, k, v = projected(made, x)
    fill = -n % m if paper else 0
    q, k, v = (F.pad(y, (0, 0, fill, 0)) for y in (q, k, v))
    edges = [-(-i * (n + fill) // m) for i in range(m + 1)]  # ceil: row i belongs to stretch floor(i m / n)
    ask, keys = (torch.stack([y[:, a:b].mean(1) for a, b in pairwise(edges)], 1) for y in (q, k))
    f, a, b = ((left @ right.transpose(1, 2)).softmax(2) for left, right in ((q, keys), (ask, keys), (ask, k)))
    whole = f @ pinv(a, 6) @ b
    expected = finished(made, x, (whole @ v)[:, fill:], v[:, fill:])
    torch.testing.assert_close(made(x), expected)
    first, share = made.first(x)
    torch.testing.assert_close(first, expected[0])
    torch.testing.assert_close(share, whole[:, fill, fill:].mean(0))


def test_the_approximation_is_exact_where_each_landmark_stands_for_equal_rows() -> None:
    """Rows that repeat in stretches: the landmarks are all there is, and A^+ is the inverse, given time to converge."""
    x = rows(5).repeat_interleave(4, 0)
    rough, exact = layer(5, iterations=40), layer(20)
    exact.load_state_dict(rough.state_dict())
    torch.testing.assert_close(rough(x), exact(x), atol=1e-8, rtol=1e-6)


def test_the_pseudo_inverse_converges_to_the_inverse() -> None:
    a = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(0)).double().softmax(2)
    torch.testing.assert_close(pinv(a, 40), torch.linalg.inv(a), atol=1e-8, rtol=1e-6)
    errors = [(pinv(a, n) - torch.linalg.inv(a)).abs().max() for n in (2, 6, 12)]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("paper", [None, "paper"])
@pytest.mark.parametrize("n", [20, 45, 64, 70])
def test_stretches_of_rows_change_nothing(n: int, paper: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the convolution looks over two borders, and where the last stretch is shorter than its reach."""
    found = []
    for size in (1000, 20):
        monkeypatch.setattr(pooled, "ROWS", size)
        made, x = layer(6, compat=paper), rows(n).requires_grad_()
        y, (first, share) = made(x), made.first(x)
        (y.square().sum() + first.sum()).backward()
        found.append([y, first, share, x.grad, *(weight.grad for weight in made.parameters())])
    for whole, in_parts in zip(*found, strict=True):
        torch.testing.assert_close(in_parts, whole)


def test_ppeg_is_three_convolutions_and_what_there_was() -> None:
    torch.manual_seed(0)
    made, x = Ppeg(WIDTH).double(), rows(26)  # 5 x 5
    square = x[1:].reshape(5, 5, WIDTH).permute(2, 0, 1)[None]
    expected = square + sum(convolve(square) for convolve in made.convolutions)
    found = made(x, 5)
    torch.testing.assert_close(found[1:].reshape(5, 5, WIDTH).permute(2, 0, 1)[None], expected)
    assert torch.equal(found[0], x[0])


def test_a_square_is_filled_up_by_the_first_patches_once_more() -> None:
    torch.manual_seed(0)
    head = TransMil(DIM, CLASSES, hidden=WIDTH, heads=HEADS, landmarks=100).double().eval()
    bag = bag_of(7)
    filled = torch.cat([bag, bag[:, :2]], 1)  # 9 patches
    one, other = head(bag, all_real(bag)), head(filled, all_real(filled))
    torch.testing.assert_close(one.logits, other.logits)
    folded = other.attention[0, 0, :7].clone()
    folded[:2] += other.attention[0, 0, 7:]
    torch.testing.assert_close(one.attention[0, 0], folded)


def test_heads_divide_the_width_and_compat_is_a_known_word() -> None:
    with pytest.raises(UserError, match=r"hidden=10 must be a multiple of model\.head\.heads=8"):
        TransMil(DIM, CLASSES, hidden=10)
    with pytest.raises(UserError, match="compat is 'published'"):
        TransMil(DIM, CLASSES, compat="published")
