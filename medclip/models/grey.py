"""Small grey pictures of a batch's images, made where the images already are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from medclip.types import Batch

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's mode L


class Grey(nn.Module):
    """`batch["image"]` uint8 RGB (b, 3, h, w) -> grey (b, 1, size, size) on a 0..1 scale, as Pillow resizes (bicubic).

    Float images of one channel are taken as grey ones already. The proportions are given up where h is not w.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("luma", torch.tensor(_LUMA).view(1, 3, 1, 1) / 255, persistent=False)
        self.luma: Tensor

    def forward(self, batch: Batch) -> Float[Tensor, "b 1 size size"]:
        image = batch["image"]  # pyright: ignore[reportTypedDictNotRequiredAccess]
        if image.is_floating_point():
            if image.shape[1] != 1:
                raise TypeError("grey pictures are made of uint8 images, whose brightness is still known")
            return image
        grey = (image.to(self.luma.dtype) * self.luma).sum(1, keepdim=True)
        if grey.shape[-2:] != (self.size, self.size):
            grey = F.interpolate(grey, (self.size, self.size), mode="bicubic", antialias=True, align_corners=False)
        return grey.clamp(0, 1)
