"""Chunked steps against the whole batch at once, and against chunks that keep their graph."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from open_clip import CLIP
from torch import Tensor

from medclip.losses.clip import clip_loss
from medclip.losses.siglip import siglip_loss
from medclip.models.build import build_net
from medclip.models.checkpointing import checkpointing
from medclip.models.chunked import chunked
from medclip.models.clip import Clip
from medclip.models.compile import compile
from medclip.models.lock import lock
from medclip.models.lora import lora
from medclip.types import Batch, ClipOutput, Preprocess, UserError

ROWS = 12
LOSSES = {"clip": clip_loss, "siglip": siglip_loss}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}
TOWERS: dict[str, Any] = {
    "vit": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
    "resnet": {"image_size": 32, "timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear"},
    "dropped": {
        "image_size": 32,
        "timm_model_name": "vit_tiny_patch16_224",
        "timm_pool": "avg",
        "timm_proj": "linear",
        "timm_proj_bias": True,
        "timm_drop": 0.2,
        "timm_drop_path": 0.4,
    },
}


def clip(tower: str = "vit", dtype: torch.dtype = torch.float32, bias: float | None = None, **vision: Any) -> Clip:
    torch.manual_seed(0)
    net = CLIP(embed_dim=16, vision_cfg=TOWERS[tower] | vision, text_cfg=TEXT, init_logit_bias=bias)
    if tower == "dropped":
        net.visual.set_input_size((32, 32))
    return Clip(net, Preprocess(size=(32, 32)), tokenizer=None, description={}).to(dtype).train()


def batch(seed: int = 0, rows: int = ROWS, words: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (rows, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Batch(image=image, text=torch.randint(1, 64, (rows, words), generator=generator))


def gradients(model: Clip, loss: Callable[[ClipOutput], Tensor] = clip_loss, **rows: int) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    loss(model(batch(**rows))).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative error of any parameter's gradient; what is 0 but for rounding counts by the mean of all."""
    assert found.keys() == expected.keys() and found
    mean = torch.stack([value.norm() for value in expected.values()]).mean()
    floor = 1e-4 * mean.item()
    return max(((found[k] - expected[k]).norm() / expected[k].norm().clamp(min=floor)).item() for k in expected)


def with_graph(model: Clip, chunks: int) -> Clip:
    """What chunking must equal to the draw: chunk after chunk, all graphs kept."""
    model.through = lambda encode, rows: torch.cat([encode(chunk) for chunk in rows.tensor_split(chunks)])
    return model


@pytest.mark.parametrize("rows", [1, 5, 11])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_gradient_is_that_of_the_whole_batch(loss: str, rows: int) -> None:
    bias = -1.0 if loss == "siglip" else None  # to InfoNCE a bias makes no difference
    for dtype, most in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        expected = gradients(clip(dtype=dtype, bias=bias), LOSSES[loss])
        assert {"net.logit_scale", "net.logit_bias"} <= expected.keys() or bias is None
        assert error(gradients(chunked(clip(dtype=dtype, bias=bias), rows), LOSSES[loss]), expected) < most


def test_towers_of_every_family(any_cfg: dict) -> None:
    """CLIP, SigLIP with a custom text tower, and BERT, whose embedding and head lie elsewhere."""

    def model() -> Clip:
        torch.manual_seed(0)
        net = build_net(any_cfg).double().eval()  # without dropout
        return Clip(net, Preprocess(size=(32, 32)), tokenizer=None, description={})

    words = any_cfg["text_cfg"]["context_length"]
    expected = gradients(model(), siglip_loss, words=words)
    assert error(gradients(chunked(model(), 5), siglip_loss, words=words), expected) < 1e-12


def test_gradients_are_added_to_those_that_are_there() -> None:
    whole, ours = clip(dtype=torch.float64, bias=-1.0), chunked(clip(dtype=torch.float64, bias=-1.0), 5)
    for model in (whole, ours):
        for seed in range(2):
            siglip_loss(model(batch(seed))).backward()
    theirs = {name: p.grad for name, p in whole.named_parameters()}
    assert error({name: p.grad for name, p in ours.named_parameters()}, theirs) < 1e-12  # type: ignore[arg-type]


@pytest.mark.parametrize("tower", ["dropped", "vit"])
def test_random_draws_are_those_that_made_the_features(tower: str) -> None:
    """Dropout, drop path and patch dropout; and the ablation: other draws in the second pass are another gradient."""
    vision = {"patch_dropout": 0.5} if tower == "vit" else {}
    expected = gradients(with_graph(clip(tower, torch.float64, **vision), 3))
    assert error(gradients(chunked(clip(tower, torch.float64, **vision), 4)), expected) < 1e-12
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.set_rng_state", lambda state: None)
        assert error(gradients(chunked(clip(tower, torch.float64, **vision), 4)), expected) > 1e-2


def test_the_step_leaves_the_generator_where_the_features_did() -> None:
    model = chunked(clip(patch_dropout=0.5), 4)
    loss = clip_loss(model(batch()))
    state = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_autocast_is_that_of_the_features() -> None:
    def loss(model: Clip, cached: bool) -> dict[str, Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            value = clip_loss(model(batch()))
        value.backward()  # outside, as trainers do
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = loss(with_graph(clip(), 3), cached=False)
    assert error(loss(chunked(clip(), 4), cached=True), expected) < 1e-6
    assert error(gradients(clip()), expected) > 1e-3  # bfloat16 was at work


def test_weights_cast_without_graph_are_not_used_with_one() -> None:
    """Autocast caches casts; a tower used a second time, with graph, must still have its gradient."""
    model = chunked(lock(clip(), "text"), 4)
    with torch.autocast("cpu", torch.bfloat16):
        model(batch())
        value = model.encode_image(batch()["image"]).square().mean(0)[0]  # pyright: ignore
    value.backward()
    assert model.net.visual.transformer.resblocks[0].mlp.c_fc.weight.grad is not None  # pyright: ignore


def test_a_frozen_tower_is_run_once_and_only_one_chunk_keeps_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chunked(lock(clip(), "text"), 4)
    seen: list[tuple[str, int, bool]] = []

    def watched(name: str, plain: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def watch(rows: Tensor) -> Tensor:
            seen.append((name, len(rows), torch.is_grad_enabled()))
            return plain(rows)

        return watch

    for name in ("encode_image", "encode_text"):
        monkeypatch.setattr(model.net, name, watched(name, getattr(model.net, name)))
    loss = clip_loss(model(batch()))
    images, texts = ([(n, graph) for name, n, graph in seen if name == one] for one in ("encode_image", "encode_text"))
    assert images == [(4, False), (4, False), (4, True)] and texts == [(4, False)] * 3
    del seen[:]
    loss.backward()
    assert seen == [("encode_image", 4, True)] * 2
    assert model.net.logit_scale.grad is not None


def test_saved_activations_are_those_of_a_chunk() -> None:
    """What autograd has packed and not given back when the loss is known: an eighth, and the features' share."""

    def saved(model: Clip) -> int:
        parameters = {p.data_ptr() for p in model.parameters()}
        alive: dict[int, int] = {}

        class Packed:
            def __init__(self, value: Tensor) -> None:
                self.value = value
                alive[id(self)] = 0 if value.data_ptr() in parameters else value.nbytes

            def __del__(self) -> None:
                alive.pop(id(self), None)

        with torch.autograd.graph.saved_tensors_hooks(Packed, lambda packed: packed.value):
            loss = clip_loss(model(batch(rows=64)))
            found = sum(alive.values())
        loss.backward()
        return found

    assert saved(clip()) > 6 * saved(chunked(clip(), 8))


def test_batch_norms_count_each_chunk_once(caplog: pytest.LogCaptureFixture) -> None:
    """After a step their running statistics are those of one pass over the chunks, and they warn once."""
    with caplog.at_level(logging.WARNING):
        ours = chunked(clip("resnet"), 6)
    assert caplog.text.count("batch norms") == 1
    theirs = with_graph(clip("resnet"), 2)
    assert error(gradients(ours), gradients(theirs)) < 1e-5
    state = theirs.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())
    counted = [value.item() for key, value in ours.state_dict().items() if key.endswith("num_batches_tracked")]
    assert counted and set(counted) == {2}


def test_with_checkpointing_adapters_and_compilation() -> None:
    plain = gradients(clip(dtype=torch.float64))
    assert error(gradients(chunked(checkpointing(clip(dtype=torch.float64)), 5)), plain) < 1e-12
    adapted = gradients(lora(clip(dtype=torch.float64), rank=2))
    assert not any("visual.conv1" in name for name in adapted)
    assert error(gradients(chunked(lora(clip(dtype=torch.float64), rank=2), 5)), adapted) < 1e-12
    compiled = chunked(compile(clip(dtype=torch.float64), backend="aot_eager"), 4)
    assert error(gradients(compiled), plain) < 1e-12
    assert error(gradients(compiled), plain) < 1e-12


def test_without_gradients_it_is_only_chunks() -> None:
    whole, ours = clip().eval(), chunked(clip().eval(), 5)
    with torch.no_grad():
        expected, found = whole(batch()), ours(batch())
    torch.testing.assert_close(found, expected)
    assert not found.image_features.requires_grad


def test_a_loss_that_needs_no_features_gives_no_gradient() -> None:
    """A batch of bad samples only: zeros, and nothing is broken; a tower that the loss does not use has none."""
    model = chunked(clip(), 5)
    out = model(batch())
    torch.stack([x[:0].sum() * 0 if x.ndim else x * 0 for x in out if x is not None]).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    model.zero_grad()
    model(batch()).text_features.sum().backward()
    assert model.net.visual.proj.grad is None and model.net.text_projection.grad is not None  # pyright: ignore


def test_the_model_stays_what_it_was() -> None:
    model, other = chunked(clip(), 5), clip()
    before = dict(model.named_parameters())
    gradients(model)
    assert all(p is before[name] for name, p in model.named_parameters())
    assert model.state_dict().keys() == other.state_dict().keys()


def test_what_cannot_be_is_one_line() -> None:
    with pytest.raises(UserError, match=r"adapt\.chunked\.rows is 0"):
        chunked(clip(), 0)
    with pytest.raises(UserError, match="leave it out"):
        chunked(torch.nn.Linear(1, 1), 8)  # type: ignore[type-var]
