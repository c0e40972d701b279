"""What every head on bags keeps to: padding, order, one patch, equal patches, half precision, long bags."""

from __future__ import annotations

import pytest
import torch

from medclip.heads import pooled
from tests.heads.bag_toys import CLASSES, HEADS, all_real, bag_of, head_of, one_hot

ORDERED = ("transmil", "transmil_paper")  # heads to which the order of the patches says where they are


@pytest.mark.parametrize("name", HEADS)
def test_padding_changes_nothing_wherever_it_is_and_whatever_is_in_it(name: str) -> None:
    head = head_of(name).eval()
    bags, labels = [bag_of(9, seed=1), bag_of(5, seed=2), bag_of(1, seed=3)], one_hot(0, 2, 1)
    alone = [head(bag, all_real(bag), labels[i : i + 1]) for i, bag in enumerate(bags)]
    real = torch.zeros(3, 14, dtype=torch.bool)
    real[0, :9] = True
    real[1, [1, 2, 6, 11, 12]] = True
    real[2, 7] = True
    together = torch.full((3, 14, bags[0].shape[2]), 50.0, dtype=torch.float64)
    for i, bag in enumerate(bags):
        together[i, real[i]] = bag[0]
    found = head(together, real, labels)
    for i, one in enumerate(alone):
        for field in ("logits", "slide", "extra"):
            torch.testing.assert_close(getattr(found, field)[i], getattr(one, field)[0], msg=f"{field} of bag {i}")
        torch.testing.assert_close(found.attention[i][:, real[i]], one.attention[0])
        assert (found.attention[i][:, ~real[i]] == 0).all()


@pytest.mark.parametrize("name", HEADS)
def test_attention_is_shares_of_the_patches(name: str) -> None:
    bag = bag_of(11, 2)
    found = head_of(name).eval()(bag, all_real(bag), one_hot(0, 1))
    assert (found.attention >= 0).all()
    torch.testing.assert_close(found.attention.sum(2), torch.ones_like(found.attention[..., 0]))
    assert found.logits.shape == (2, CLASSES)
    assert found.extra.shape == (2, len(head_of(name).extra_names))  # pyright: ignore


@pytest.mark.parametrize("name", HEADS)
def test_the_order_of_the_patches(name: str) -> None:
    head = head_of(name).eval()
    bag, order = bag_of(20), torch.randperm(20, generator=torch.Generator().manual_seed(5))
    one, other = (head(x, all_real(x), one_hot(1)) for x in (bag, bag[:, order]))
    if name in ORDERED:
        assert (one.logits - other.logits).abs().max() > 1e-6
        return
    torch.testing.assert_close(other.logits, one.logits)
    torch.testing.assert_close(other.slide, one.slide)
    torch.testing.assert_close(other.extra, one.extra)
    torch.testing.assert_close(other.attention, one.attention[:, :, order])


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("bag", [bag_of(1), bag_of(1).expand(1, 7, -1), torch.zeros(2, 5, 12).double()])
def test_one_patch_equal_patches_and_no_patch_have_finite_gradients(name: str, bag: torch.Tensor) -> None:
    head = head_of(name).train()
    real = all_real(bag)
    real[1:] = False  # a bag of padding alone
    found = head(bag.clone().requires_grad_(), real, one_hot(*range(len(bag))))
    (found.logits.sum() + found.slide.sum() + found.extra.sum()).backward()
    for key, weight in head.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all(), key  # none missing: DDP waits for each


@pytest.mark.parametrize("name", HEADS)
def test_a_long_bag_is_worked_on_by_rows_with_the_same_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bag, label = bag_of(170, 2), one_hot(0, 2)
    found = []
    for rows in (pooled.ROWS, 48, 32):  # one stretch, several that are kept, several that are made anew
        monkeypatch.setattr(pooled, "ROWS", rows)
        head = head_of(name).eval()
        out = head(bag, all_real(bag), label)
        (out.logits.square().sum() + out.extra.sum()).backward()
        found.append([*out, *(weight.grad for weight in head.parameters())])
    for whole, kept, anew in zip(*found, strict=True):
        torch.testing.assert_close(whole, kept)
        torch.testing.assert_close(whole, anew)


@pytest.mark.parametrize("name", HEADS)
def test_features_in_half_precision_are_what_they_are_in_single(name: str) -> None:
    head = head_of(name).float().eval()
    bag = bag_of(9).half()
    half, single = head(bag, all_real(bag)), head(bag.float(), all_real(bag))
    for a, b in zip(half, single, strict=True):
        torch.testing.assert_close(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        rough = head(bag, all_real(bag), one_hot(0).float())
    torch.testing.assert_close(rough.logits.float(), single.logits, atol=0.05, rtol=0.05)
    torch.testing.assert_close(rough.attention.float().sum(2), torch.ones_like(rough.attention[..., 0].float()))


@pytest.mark.parametrize("name", HEADS)
def test_without_labels_nothing_is_taught_and_all_else_is_the_same(name: str) -> None:
    head = head_of(name).eval()
    bag = bag_of(9)
    told, untold = head(bag, all_real(bag), one_hot(1)), head(bag, all_real(bag))
    assert torch.equal(told.logits, untold.logits) and torch.equal(told.attention, untold.attention)
    unknown = head(bag, all_real(bag), torch.full((1, CLASSES), torch.nan).double())
    torch.testing.assert_close(unknown.extra, untold.extra)
