"""Masked autoencoding step: the time of the original implementation over ours, same weights, same masks, same loss.

    scripts/bench/mae.py [--quick]

The peer is the original as published (He et al. 2022, arXiv:2111.06377), written anew in its manner: a convolution
embeds every patch, most are dropped, tokens are shuffled back, every decoder block and the head compute all of them,
attention is explicit, and the loss of all patches is multiplied by the mask. Both sides hold the same parameters of a
ViT-S/16 with a decoder of 512 x 2, as the chest X-ray recipe has it (arXiv:2210.12843), and do forward, backward, and
nothing else, on one thread. At the recipe's mask 0.90 in float32 the losses must agree to 1e-6; mask 0.75, bfloat16,
and which path of attention is faster in bfloat16 are told beside it.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import torch
from _timing import Cost, arguments, interleave, measure, ratios, report, table
from timm.layers.attention import Attention
from torch import Tensor

from medclip.losses.mae import mae_loss
from medclip.models import attention
from medclip.models.mae import Mae, build_mae

BATCH = 16
PEER = "original-as-published"


def ours(model: Mae, image: Tensor, noise: Tensor) -> Tensor:
    out = model({"image": image}, noise)
    return mae_loss(out.prediction, out.target)


def original(model: Mae, image: Tensor, noise: Tensor) -> Tensor:
    """The loss as the paper's formulas read, in the order in which the published code computes them."""
    kept, dim = model.shape.kept, model.shape.dim
    order = noise.argsort(dim=1)
    restore = order.argsort(dim=1)

    x = model.patch_embed(image) + model.pos_embed[:, 1:]
    x = x.gather(1, order[:, :kept, None].repeat(1, 1, dim))
    x = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
    for block in model.blocks:
        x = block(x)
    x = model.decoder_embed(model.norm(x))

    blanks = model.mask_token.repeat(len(x), restore.shape[1] - kept, 1)
    patches = torch.cat([x[:, 1:], blanks.to(x.dtype)], dim=1).gather(1, restore[..., None].repeat(1, 1, x.shape[2]))
    x = torch.cat([x[:, :1], patches], dim=1) + model.decoder_pos_embed
    for block in model.decoder_blocks:
        x = block(x)
    drawn = model.decoder_pred(model.decoder_norm(x))[:, 1:]

    p, (rows, columns) = model.shape.patch_size, model.shape.grid
    truth = torch.einsum("bcrpsq->brspqc", image.reshape(len(image), 3, rows, p, columns, p)).reshape(drawn.shape)
    mask = (restore >= kept).float()
    return (((drawn - truth) ** 2).mean(-1) * mask).sum() / mask.sum()


def step(loss: Callable[[Mae, Tensor, Tensor], Tensor], model: Mae, images: Tensor, noise: Tensor, bf16: bool) -> float:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        value = loss(model, images, noise)
    value.backward()
    return value.item()


def explicit(model: Mae) -> Mae:
    """Attention of timm's blocks, which only the peer calls, by matrix products as published."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.fused_attn = False  # pyright: ignore[reportAttributeAccessIssue]
    return model


def compare(mask: float, bf16: bool, steps: int, runs: int) -> list[tuple[Cost, Cost]]:
    """Pairs of (ours, original); stops where the losses are not the same."""
    torch.manual_seed(0)
    model = explicit(build_mae(dim=384, depth=12, heads=6, decoder_depth=2, mask_ratio=mask))
    images, noise = torch.randn(BATCH, 3, 224, 224), torch.rand(BATCH, model.shape.patches)
    losses = [step(side, model, images, noise, bf16) for side in (ours, original)]
    if abs(losses[0] - losses[1]) > (1e-2 if bf16 else 1e-6):
        sys.exit(f"mae: the losses differ ({losses}), so the speeds do not compare")

    def run(side: Callable[[Mae, Tensor, Tensor], Tensor]) -> Cost:
        def work() -> int:
            for _ in range(steps):
                step(side, model, images, noise, bf16)
            return steps * BATCH

        return measure(work)

    pairs = interleave(lambda: run(ours), lambda: run(original), runs=runs)
    print(f"mask {mask}, {'bfloat16' if bf16 else 'float32'}, batch {BATCH}, loss {losses[0]:.7f} and {losses[1]:.7f}")
    return pairs


def bf16_paths(steps: int, runs: int) -> None:
    """Ours in bfloat16 by explicit attention, which the rule chooses on a CPU, and by the fused one."""
    torch.manual_seed(0)
    model = build_mae(dim=384, depth=12, heads=6, decoder_depth=2, mask_ratio=0.9)
    images, noise = torch.randn(BATCH, 3, 224, 224), torch.rand(BATCH, model.shape.patches)
    rule = attention.use_fused

    def run(fused: bool) -> Cost:
        attention.use_fused = lambda device, dtype: fused
        try:
            return measure(lambda: sum(BATCH for _ in range(steps) if step(ours, model, images, noise, True)))
        finally:
            attention.use_fused = rule

    pairs = interleave(lambda: run(False), lambda: run(True), runs=runs)
    print(f"mask 0.9, bfloat16, explicit v fused attention: {statistics.median(ratios(pairs)):.3f}")


def main() -> None:
    args = arguments(__doc__)
    torch.set_num_threads(1)
    steps, runs = (1, 3) if args.quick else (3, 5)
    for mask, bf16 in ((0.75, False), (0.9, True)):
        pairs = compare(mask, bf16, steps, runs)
        print(table(pairs, "image", PEER))
        print(f"  ratio {statistics.median(ratios(pairs)):.3f}")
    bf16_paths(steps, runs)
    report("mae", compare(0.9, False, steps, runs), unit="image", peer=PEER)


if __name__ == "__main__":
    main()
