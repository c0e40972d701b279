"""The masked autoencoder against the paper's own way of computing it, its numbers, and its published names."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from medclip.losses.mae import mae_loss
from medclip.models import attention
from medclip.models.mae import Mae, MaeOutput, MaeShape, build_mae, load_mae, mae_from, patchify, save_mae, unpatchify
from medclip.types import Preprocess, UserError
from tests.models.mae_plain import plain_mae

SMALL: dict[str, Any] = {"image_size": 48, "patch_size": 8, "dim": 32, "depth": 2, "heads": 4, "mask_ratio": 0.75}
SMALL |= {"decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 2}


def small(**changes: Any) -> Mae:
    torch.manual_seed(0)
    model = build_mae(**SMALL | changes)
    for parameter in model.parameters():  # zero biases and unit gains would hide a wrong one
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def images(n: int = 3, size: int = 48) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("changes", [{}, {"decoder_depth": 1}, {"mask_ratio": 0.9}, {"decoder_depth": 3}], ids=str)
def test_loss_and_gradients_are_the_papers(changes, normalise):
    """Patches cut before they are embedded, the shared first block, the last block on masked patches: all exact."""
    model = small(**changes)
    image, noise = torch.randn(3, 3, 48, 48), torch.rand(3, 36)
    out = model({"image": image}, noise)
    loss = mae_loss(out.prediction, out.target, normalise=normalise)
    loss.backward()
    ours = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    expected, prediction, mask = plain_mae(model, image, noise, normalise)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert torch.equal(out.mask, mask)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    everything = model({"image": image}, noise, draw_all=True)
    torch.testing.assert_close(everything.prediction[1][out.ids[1].argsort()], prediction[1], rtol=1e-4, atol=1e-5)


def test_explicit_attention_is_the_fused_one(monkeypatch):
    q, k, v = (torch.randn(2, 3, n, 8) for n in (4, 6, 6))
    fused = attention.attend(q, k, v)
    monkeypatch.setattr(attention, "use_fused", lambda device, dtype: False)
    torch.testing.assert_close(attention.attend(q, k, v), fused)


def test_path_by_dtype_and_device():
    """On a CPU explicit in bfloat16; autocast's type counts, not the input's."""
    cpu = torch.device("cpu")
    assert attention.use_fused(cpu, torch.float32) and not attention.use_fused(cpu, torch.bfloat16)
    assert attention.use_fused(torch.device("cuda"), torch.bfloat16)
    model, x = small(), torch.randn(1)
    with torch.autocast("cpu", torch.bfloat16):
        attention.choose_path(model, x)
        assert not any(block.attn.fused_attn for block in model.blocks)
    attention.choose_path(model, x)
    assert all(block.attn.fused_attn for block in model.blocks)


def test_bf16_is_near_fp32():
    model, image, noise = small(), torch.randn(3, 3, 48, 48), torch.rand(3, 36)
    exact = model({"image": image}, noise)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model({"image": image}, noise)
    assert rough.prediction.dtype == torch.bfloat16 and rough.target.dtype == torch.float32
    torch.testing.assert_close(rough.prediction.float(), exact.prediction, rtol=0.05, atol=0.05)


def test_counts_of_the_recipe():
    """Mask 0.90 of 196 keeps int(19.6) = 19, never 20; 0.75 keeps 49."""
    shape = MaeShape(dim=384, heads=6, decoder_depth=2, mask_ratio=0.9)
    assert (shape.patches, shape.kept) == (196, 19)
    assert MaeShape(mask_ratio=0.75).kept == 49
    tiny = build_mae(
        image_size=224, dim=8, depth=1, heads=1, decoder_dim=8, decoder_depth=1, decoder_heads=1, mask_ratio=0.9
    )
    out = tiny({"image": images(4, 224)})
    assert out.mask.mean().item() == pytest.approx(177 / 196)
    assert (out.mask.sum(1) == 177).all()
    assert (out.ids.sort(1).values == torch.arange(196)).all()  # a permutation in each sample
    assert len({tuple(row.tolist()) for row in out.mask}) == 4  # drawn for each sample by itself
    assert torch.equal(out.mask.gather(1, out.ids), (torch.arange(196) >= 19).float().expand(4, -1))


def test_targets_are_the_masked_pixels_alone():
    model, image, noise = small(), torch.randn(1, 3, 48, 48), torch.rand(1, 36)
    out = model({"image": image}, noise)
    patches = patchify(image, 8)
    for place, patch in zip(out.ids[0, 9:].tolist(), out.target[0], strict=True):
        row, column = divmod(place, 6)
        block = image[0, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        assert torch.equal(patch.view(8, 8, 3), block.permute(1, 2, 0))
    # A visible patch may change: no target does, only what is drawn from it.
    patches[0, out.ids[0, 0]] += 1
    other = model({"image": unpatchify(patches, 8, (6, 6))}, noise)
    assert torch.equal(other.target, out.target)
    assert not torch.allclose(other.prediction, out.prediction)


def test_patchify_there_and_back():
    image = torch.randn(2, 3, 16, 24)
    assert torch.equal(unpatchify(patchify(image, 8), 8, (2, 3)), image)


def test_uint8_is_normalised_by_each_rows_own_statistics():
    model, image, noise = (
        small(preprocess={"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}),
        images(2),
        torch.rand(2, 36),
    )
    own = torch.tensor([[0.4, 0.5, 0.6], [0.2, 0.3, 0.4]]).view(2, 1, 3, 1, 1)
    by_hand = (image / 255 - own[0]) / own[1]
    torch.testing.assert_close(model({"image": image}, noise).target, model({"image": by_hand}, noise).target)
    mean, std = torch.tensor([[0.5] * 3, [0.1] * 3]), torch.tensor([[0.25] * 3, [0.5] * 3])
    by_hand = (image / 255 - mean[:, :, None, None]) / std[:, :, None, None]
    found = model({"image": image, "mean": mean, "std": std}, noise)
    torch.testing.assert_close(found.target, model({"image": by_hand}, noise).target)


def test_initial_weights_are_the_papers():
    torch.manual_seed(0)
    model = build_mae(image_size=224, dim=192, depth=1, heads=3, decoder_dim=128, decoder_depth=1, decoder_heads=4)
    for weight in (model.patch_embed.proj.weight.flatten(1), model.blocks[0].mlp.fc1.weight, model.decoder_pred.weight):
        bound = math.sqrt(6 / sum(weight.shape))  # Xavier's uniform bound; the kernel counts as the matrix it is
        assert weight.abs().max().item() == pytest.approx(bound, rel=1e-2)
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=2e-2)
    assert model.mask_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert not model.blocks[0].attn.qkv.bias.any() and model.norm.eps == 1e-6
    assert not model.pos_embed.requires_grad and not model.decoder_pos_embed.requires_grad


def published_keys(depth: int, decoder_depth: int) -> set[str]:
    """Names in the state dicts that MAE and Medical MAE published."""
    parts = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    layers = ["patch_embed.proj", "norm", "decoder_embed", "decoder_norm", "decoder_pred"]
    layers += [f"blocks.{i}.{part}" for i in range(depth) for part in parts]
    layers += [f"decoder_blocks.{i}.{part}" for i in range(decoder_depth) for part in parts]
    tokens = {"cls_token", "pos_embed", "mask_token", "decoder_pos_embed"}
    return tokens | {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def test_names_are_the_published_ones_and_round_trip_exactly(tmp_path: Path):
    model = small()
    assert model.state_dict().keys() == published_keys(2, 2)
    save_mae(model, tmp_path / "mae.pth")
    saved = torch.load(tmp_path / "mae.pth", weights_only=True)["model"]
    assert saved.keys() == published_keys(2, 2)
    other = build_mae(**SMALL, pretrained=str(tmp_path / "mae.pth"))
    for key, value in other.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


def test_files_as_their_own_code_writes_them(tmp_path: Path):
    """With optimiser, epoch and the command line's Namespace beside the weights; under DDP's prefix; bare."""
    state = small().state_dict()
    beside = {"optimizer": {"state": {}}, "epoch": 799, "args": argparse.Namespace(blr=1.5e-4, output_dir="x")}
    wrapped = {f"module.{key}": value for key, value in state.items()}
    for name, content in {"a.pth": {"model": state, **beside}, "b.pth": {"model": wrapped}, "c.pt": state}.items():
        torch.save(content, tmp_path / name)
        found = build_mae(**SMALL, pretrained=str(tmp_path / name)).state_dict()
        assert all(torch.equal(found[key], state[key]) for key in state)


def test_an_encoder_alone_leaves_the_decoder(tmp_path: Path):
    model = small()
    save_mae(model, tmp_path / "encoder.pth", encoder_only=True)
    assert not any("mask_token" in key or "decoder" in key for key in torch.load(tmp_path / "encoder.pth")["model"])
    other = build_mae(**SMALL)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    load_mae(other, tmp_path / "encoder.pth")
    assert torch.equal(other.blocks[1].mlp.fc2.weight, model.blocks[1].mlp.fc2.weight)
    assert torch.equal(other.decoder_pred.weight, before["decoder_pred.weight"])


def test_a_checkpoint_of_ours(tmp_path: Path):
    model = small()
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"medclip": model.description, "state_dict": state}, tmp_path / "last.ckpt")
    other = build_mae(**SMALL, pretrained=str(tmp_path / "last.ckpt"))
    assert torch.equal(other.decoder_pred.weight, model.decoder_pred.weight)


class Runs:
    """Would run code when unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("exit 1",)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state.pop("norm.bias"), r"lacks norm\.bias"),
        (lambda state: state.update(extra=torch.ones(1)), "surplus extra"),
        (
            lambda state: state.update(cls_token=torch.ones(1, 1, 8)),
            r"cls_token of \(1, 1, 8\) instead of \(1, 1, 32\)",
        ),
        (lambda state: state.pop("decoder_pred.bias"), r"lacks decoder_pred\.bias"),
        (lambda state: state.pop("patch_embed.proj.weight"), "no masked autoencoder"),
        (lambda state: state.update(norm=Runs()), "more than tensors"),
        (lambda state: state.update(norm=3), "`norm` is no tensor"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, says, tmp_path: Path):
    state = dict(small().state_dict())
    change(state)
    torch.save({"model": state}, tmp_path / "mae.pth")
    with pytest.raises(UserError, match=says):
        build_mae(**SMALL, pretrained=str(tmp_path / "mae.pth"))


def test_missing_file_is_one_line(tmp_path: Path):
    with pytest.raises(UserError, match=r"nothing\.pth does not exist"):
        build_mae(**SMALL, pretrained=str(tmp_path / "nothing.pth"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image_size": 50}, "no multiple of patch_size 8"),
        ({"heads": 5}, "dim=32"),
        ({"decoder_dim": 18}, "decoder_dim=18"),
        ({"mask_ratio": 0.99}, "keeps 0 of 36"),
        ({"mask_ratio": 0.0}, "keeps 36 of 36"),
        ({"depth": 0}, "1 or more"),
        ({"width": 32}, "model.width is unknown"),
    ],
)
def test_sizes_that_do_not_go_together(change, says):
    with pytest.raises(UserError, match=says):
        build_mae(**SMALL | change)


def test_description_makes_the_same_model_again():
    model = small(preprocess={"mean": [0.5] * 3, "std": [0.25] * 3})
    other = mae_from(model.description)
    other.load_state_dict(model.state_dict())
    batch, noise = {"image": images()}, torch.rand(3, 36)
    assert torch.equal(other(batch, noise).prediction, model(batch, noise).prediction)
    assert other.preprocess == model.preprocess == Preprocess((48, 48), (0.5,) * 3, (0.25,) * 3)


def test_pictures_show_the_image_and_paste_what_was_seen():
    model, image, noise = small(), images(2), torch.rand(2, 36)
    shown = model.draw({"image": image}, noise)
    torch.testing.assert_close(shown.original, image / 255, atol=1e-5, rtol=0)
    hidden = model({"image": image}, noise).mask.view(2, 1, 6, 6).repeat_interleave(8, 2).repeat_interleave(8, 3) > 0
    hidden = hidden.expand(-1, 3, -1, -1)
    for picture in (shown.seen, shown.pasted):
        torch.testing.assert_close(picture[~hidden], (image / 255)[~hidden], atol=1e-5, rtol=0)
    torch.testing.assert_close(shown.seen[hidden].view(2, 3, -1).mean((0, 2)), torch.tensor(model.preprocess.mean))
    assert torch.equal(shown.pasted[hidden], shown.drawn[hidden])
    assert (shown.pasted[hidden] - (image / 255)[hidden]).abs().mean() > 0.05


def test_pictures_of_normalised_pixels_get_their_brightness_back(monkeypatch):
    """A model that draws every patch as its normalised self, perfectly, draws the image."""
    model, image, noise = small(), images(2), torch.rand(2, 36)
    ids = noise.argsort(1)
    truth = patchify((image / 255 - torch.tensor(model.preprocess.mean).view(1, 3, 1, 1)), 8)
    truth = truth.unflatten(-1, (-1, 3)).div(torch.tensor(model.preprocess.std)).flatten(-2)
    perfect = (truth - truth.mean(-1, keepdim=True)) / (truth.var(-1, keepdim=True) + 1e-6).sqrt()
    perfect = torch.stack([perfect[i, ids[i]] for i in range(2)])
    mask = (ids.argsort(1) >= 9).float()
    monkeypatch.setattr(Mae, "forward", lambda *args, **kwargs: MaeOutput(perfect, perfect, mask, ids))
    torch.testing.assert_close(
        model.draw({"image": image}, noise, normalised=True).drawn, image / 255, atol=1e-4, rtol=0
    )
