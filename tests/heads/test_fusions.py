"""BAN and SAN against their formulas written out with einsum, on the modules' own weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medclip.heads.ban import Ban
from medclip.heads.san import San

B, V, Q, WORDS = 3, 6, 8, 12


def inputs(objects: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, objects, V, generator=generator), torch.randn(B, WORDS, Q, generator=generator)


def matrix(layer: nn.Module) -> Tensor:
    """g * V / ||V||, the norm over all of V."""
    gain, direction = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    return gain * direction / (direction**2).sum().sqrt()


def rectified(layers: nn.Sequential, x: Tensor) -> Tensor:
    return F.relu(torch.einsum("oi,bni->bno", matrix(layers[1]), x) + layers[1].bias)


def ban_by_hand(ban: Ban, objects: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    inner = ban.attention
    kernel = inner.parametrizations.kernel
    h = kernel.original0 * kernel.original1 / kernel.original1.norm()
    logits = torch.einsum("gc,bic,bjc->bgij", h, rectified(inner.objects, objects), rectified(inner.words, words))
    attention = (logits.double().exp() / logits.double().exp().sum((2, 3), keepdim=True)).float()
    for g in range(attention.shape[1]):
        seen, read = rectified(ban.objects[g], objects), rectified(ban.words[g], words)
        pooled = torch.einsum("bij,bic,bjc->bc", attention[:, g], seen, read)
        words = words + (pooled @ matrix(ban.onward[g][1]).T + ban.onward[g][1].bias)[:, None]
    return words.sum(1), attention


@pytest.mark.parametrize("objects", [1, 5])
@pytest.mark.parametrize("glimpses", [1, 2, 10])
def test_ban_is_its_formula(objects: int, glimpses: int):
    torch.manual_seed(glimpses)
    ban = Ban(V, Q, glimpses=glimpses).eval()
    joint, attention = ban(*inputs(objects))
    by_hand = ban_by_hand(ban, *inputs(objects))
    torch.testing.assert_close(joint, by_hand[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attention, by_hand[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attention.sum((2, 3)), torch.ones(B, glimpses))


def test_bans_glimpses_add_to_the_question():
    """Without what the glimpses hand on, the joint vector is the sum of the words."""
    ban = Ban(V, Q, glimpses=3).eval()
    objects, words = inputs(2)
    assert not torch.allclose(ban(objects, words)[0], words.sum(1))
    for onward in ban.onward:
        onward[1].parametrizations.weight.original0.data.zero_()
        onward[1].bias.data.zero_()
    assert torch.equal(ban(objects, words)[0], words.sum(1))


def test_objects_of_zeros_are_padding_but_never_all_of_them():
    ban, san = Ban(V, Q).eval(), San(V, Q).eval()
    objects, words = inputs(3)
    padded = torch.cat([objects, torch.zeros(B, 2, V)], 1)
    for fusion in (ban, san):
        attention = fusion(padded, words)[1]
        assert torch.equal(attention[:, :, 3:], torch.zeros_like(attention[:, :, 3:]))
        torch.testing.assert_close(attention[:, :, :3], fusion(objects, words)[1])
        nothing = fusion(torch.zeros(B, 2, V), words)
        assert all(x.isfinite().all() for x in nothing)
        nothing[0].sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in fusion.parameters())


@pytest.mark.parametrize("objects", [1, 5])
@pytest.mark.parametrize("stacks", [1, 2, 3])
def test_san_is_its_formula(objects: int, stacks: int):
    torch.manual_seed(stacks)
    san = San(V, Q, stacks=stacks).eval()
    v, words = inputs(objects)
    u, shares = words[:, -1], []
    for k in range(stacks):
        asked = torch.einsum("oi,bi->bo", san.ask[k].weight, u) + san.ask[k].bias
        seen = torch.einsum("oi,bvi->bvo", san.see[k].weight, v)
        score = torch.einsum("o,bvo->bv", san.score[k][1].weight[0], torch.tanh(asked[:, None] + seen))
        share = score.exp() / score.exp().sum(1, keepdim=True)
        u = (asked if k == 0 else u) + torch.einsum("bv,bvo->bo", share, seen)
        shares.append(share)
    joint, attention = san(v, words)
    torch.testing.assert_close(joint, u, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attention.sum(3), torch.stack(shares, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attention.sum((2, 3)), torch.ones(B, stacks))


def test_san_with_one_object_has_no_choice():
    san = San(V, Q).eval()
    attention = san(*inputs(1))[1]
    torch.testing.assert_close(attention.sum(3), torch.ones(B, 2, 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("fusion", [Ban, San])
def test_a_row_is_the_same_alone(fusion: type[nn.Module]):
    fused = fusion(V, Q).eval()
    objects, words = inputs(4)
    whole = fused(objects, words)
    alone = fused(objects[1:2], words[1:2])
    for a, b in zip(whole, alone, strict=True):
        torch.testing.assert_close(a[1:2], b)
