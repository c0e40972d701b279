"""The masked autoencoder as the paper has it, slowly: every patch embedded, order restored, everything drawn.

Written from arXiv:2111.06377, section 3, on the parameters of our `Mae`; scripts/bench/mae.py times it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medclip.models.mae import Mae


def plain_mae(model: Mae, image: Tensor, noise: Tensor, normalise: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, prediction (b, patches, pixels) in the image's order, mask (b, patches)) of a normalised image."""
    shape = model.shape
    b, p, length = len(image), shape.patch_size, shape.patches
    order = noise.argsort(1)
    restore = order.argsort(1)
    mask = (restore >= shape.kept).float()

    # Encoder: embed all, add positions, drop.
    x = model.patch_embed(image) + model.pos_embed[:, 1:]
    x = torch.stack([x[i, order[i, : shape.kept]] for i in range(b)])
    x = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(b, -1, -1), x], 1)
    for block in model.blocks:
        x = block(x)
    x = model.decoder_embed(model.norm(x))

    # Decoder: mask tokens to the end, unshuffle, add positions.
    full = torch.cat([x[:, 1:], model.mask_token.expand(b, length - shape.kept, -1)], 1)
    full = torch.stack([full[i, restore[i]] for i in range(b)])
    x = torch.cat([x[:, :1], full], 1) + model.decoder_pos_embed
    for block in model.decoder_blocks:
        x = block(x)
    prediction = model.decoder_pred(model.decoder_norm(x))[:, 1:]

    rows, columns = shape.grid
    target = image.view(b, 3, rows, p, columns, p).permute(0, 2, 4, 3, 5, 1).reshape(b, length, -1)
    if normalise:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    error = ((prediction - target) ** 2).mean(-1)
    return (error * mask).sum() / mask.sum(), prediction, mask
