"""A CLIP of any open_clip family behind one small face: `Batch -> ClipOutput`, with its preprocessing and tokenizer.

`Clip` owns an open_clip `CLIP` or `CustomTextCLIP` (ViT, ResNet, ConvNeXt, ViTamin, MobileCLIP, SigLIP, HF text towers)
as `.net` and adds what every caller would otherwise repeat: normalising uint8 images where they already are, unit-norm
features, and the scalars as they enter the logits. `.description` is a plain dict from which the same model is rebuilt
(`medclip.models.build`), so that a checkpoint needs nothing but itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped
from open_clip import CLIP, CustomTextCLIP
from torch import Tensor, nn

from medclip.types import Batch, ClipOutput, Preprocess, Tokenizer

OpenClip = CLIP | CustomTextCLIP
Encode = Callable[[Tensor], Tensor]  # (b, ...) -> unit-norm (b, d)


class Clip(nn.Module):
    """An open_clip dual encoder with the preprocessing and the tokenizer that it was trained with.

    Args:
        net: open_clip's `CLIP` or `CustomTextCLIP`.
        preprocess: how its images are made; `mean` and `std` are applied here, the rest by the data.
        tokenizer: texts to ids of the right length.
        description: what `medclip.models.build.build_clip` needs to make this model again, as plain lists, strings and
            numbers.
    """

    def __init__(
        self, net: OpenClip, preprocess: Preprocess, tokenizer: Tokenizer, description: dict[str, Any]
    ) -> None:
        super().__init__()
        self.net = net
        self.preprocess = preprocess
        self.tokenizer = tokenizer
        self.description = description
        self.memory_format = torch.contiguous_format
        self.through: Callable[[Encode, Tensor], Tensor] = _at_once  # how `forward` runs a tower over a batch's rows
        self.still: list[nn.Module] = []  # parts that stay in eval mode while the rest trains: what is locked
        mean = torch.tensor(preprocess.mean, dtype=torch.float64).view(1, 3, 1, 1)
        std = torch.tensor(preprocess.std, dtype=torch.float64).view(1, 3, 1, 1)
        # (x / 255 - mean) / std = x * pixel_scale + pixel_shift. Not persistent: the state dict stays open_clip's own.
        self.register_buffer("pixel_scale", (1 / (255 * std)).float(), persistent=False)
        self.register_buffer("pixel_shift", (-mean / std).float(), persistent=False)
        self.pixel_scale: Tensor
        self.pixel_shift: Tensor

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for part in self.still:
            part.eval()
        return self

    @property
    def device(self) -> torch.device:
        return self.pixel_scale.device

    @property
    def logit_scale(self) -> nn.Parameter:
        """The parameter itself, in log space, for clamping."""
        return self.net.logit_scale

    def normalise(self, image: Shaped[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """uint8 pixels -> normalised, of the tower's type, in one pass; floats are taken as normalised already."""
        if image.dtype == torch.uint8:
            # In place on the converted copy: a fused multiply-add from uint8 takes twice as long on CPUs.
            image = image.to(torch.float32).mul_(self.pixel_scale).add_(self.pixel_shift)
        return image.to(self.logit_scale.dtype, memory_format=self.memory_format)

    def encode_image(self, image: Shaped[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        return _unit(self.net.encode_image(self.normalise(image)))

    def encode_text(self, text: Int64[Tensor, "b context"]) -> Float[Tensor, "b d"]:
        return _unit(self.net.encode_text(text))

    def forward(self, batch: Batch) -> ClipOutput:
        """`batch["image"]` (b, 3, h, w) and `batch["text"]` (b, context) -> features (b, d) and the logits' scalars."""
        assert "image" in batch and "text" in batch
        bias = self.net.logit_bias
        return ClipOutput(
            image_features=self.through(self.encode_image, batch["image"]),
            text_features=self.through(self.encode_text, batch["text"]),
            logit_scale=self.logit_scale.exp().reshape(()),  # some open_clip configs hold it as a vector of one
            logit_bias=None if bias is None else bias.reshape(()),
        )

    def use_channels_last(self) -> Clip:
        """Keep the image tower's kernels and images as (b, h, w, c) in memory, which convolutions run faster on."""
        self.memory_format = torch.channels_last
        self.net.visual.to(memory_format=torch.channels_last)
        return self


def _at_once(encode: Encode, rows: Tensor) -> Tensor:
    return encode(rows)


def _unit(features: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
    # In bf16 the norm itself would be rounded to 3 digits; the similarities deserve float32.
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
