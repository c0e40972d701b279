"""A convolutional auto-encoder that takes noise out of small grey pictures, MEVF's second eye (arXiv:1909.11867).

Encoder: 3x3 convolutions 1-64, 64-32, 32-16 with ReLU, halved twice by max pooling; so 128 x 128 pixels become a code
of 16 x 32 x 32 = 16384. Decoder: transposed convolution 16-32 (stride 2), convolution 32-32, transposed convolution
32-64 (stride 2), convolution 64-1 and a sigmoid. The parameters have the names of the published weights, which load
strictly.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from medclip.models.encoder import refuse_unlike
from medclip.models.grey import Grey
from medclip.models.weights import read_checkpoint
from medclip.types import Batch, Preprocess, UserError

SIZE = 128  # pixels, square
CODE = 16 * (SIZE // 4) ** 2


class Denoised(NamedTuple):
    """What a step of training gets: each row's mean squared error, between what was drawn and the clean picture."""

    drawn: Float[Tensor, " b"]


class Pictures(NamedTuple):
    """For people, on a 0..1 scale: the grey picture, the same with noise, what was drawn of that."""

    original: Float[Tensor, "b 3 h w"]
    seen: Float[Tensor, "b 3 h w"]
    drawn: Float[Tensor, "b 3 h w"]


class Dae(nn.Module):
    """`Batch` -> `Denoised`.

    Args:
        noise: standard deviation of the Gaussian noise on the picture that is seen, on a 0..1 scale.
        image_size: pixels of the images that it is handed, before they are made grey and small. 224 is what it gets
            beside most CLIPs.
    """

    tokenizer = None

    def __init__(self, *, noise: float = 0.1, image_size: int = 224) -> None:
        super().__init__()
        if noise < 0:
            raise UserError(f"model.noise is {noise}: give a standard deviation of 0 or more")
        self.noise = noise
        self.preprocess = Preprocess(size=(image_size, image_size))
        self.grey = Grey(SIZE)
        self.conv1 = nn.Conv2d(1, 64, 3, padding=1)
        self.conv2 = nn.Conv2d(64, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 16, 3, padding=1)
        self.tran_conv1 = nn.ConvTranspose2d(16, 32, 3, stride=2, padding=1, output_padding=1)
        self.conv4 = nn.Conv2d(32, 32, 3, padding=1)
        self.tran_conv2 = nn.ConvTranspose2d(32, 64, 3, stride=2, padding=1, output_padding=1)
        self.conv5 = nn.Conv2d(64, 1, 3, padding=1)
        # On CPUs a step takes half the time so, and with ReLU after the pooling: the same maxima, fewer numbers.
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    @property
    def description(self) -> dict[str, Any]:
        """Plain data that says what it is, without its weights."""
        return {"kind": "dae", "noise": self.noise, "preprocess_cfg": self.preprocess.as_dict()}

    def encode(self, grey: Float[Tensor, "b 1 128 128"]) -> Float[Tensor, "b 16 32 32"]:
        x = F.relu(F.max_pool2d(self.conv1(grey.contiguous(memory_format=torch.channels_last)), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        return F.relu(self.conv3(x))

    def decode(self, code: Float[Tensor, "b 16 32 32"]) -> Float[Tensor, "b 1 128 128"]:
        x = F.relu(self.conv4(F.relu(self.tran_conv1(code))))
        return self.conv5(F.relu(self.tran_conv2(x))).sigmoid()

    def forward(self, batch: Batch) -> Denoised:
        """Noise from torch's generator; the target is the clean picture."""
        grey = self.grey(batch)
        return Denoised(squared_error(self.decode(self.encode(self._noisy(grey))), grey))

    @torch.no_grad()
    def draw(self, batch: Batch, *, normalised: bool = False) -> Pictures:
        """Pictures for people; `normalised` is for masked autoencoders."""
        grey = self.grey(batch)
        noisy = self._noisy(grey)
        shown = (grey, noisy.clamp(0, 1), self.decode(self.encode(noisy)))
        return Pictures(*(x.expand(-1, 3, -1, -1) for x in shown))

    def _noisy(self, grey: Tensor) -> Tensor:
        return grey + self.noise * torch.randn_like(grey)


def squared_error(drawn: Float[Tensor, "b 1 h w"], grey: Float[Tensor, "b 1 h w"]) -> Float[Tensor, " b"]:
    """Mean over a row's pixels, in float32 at least."""
    wide = torch.promote_types(drawn.dtype, torch.float32)
    return (drawn.to(wide) - grey.to(wide)).square().flatten(1).mean(1)


def build_dae(*, pretrained: str | None = None, noise: float = 0.1, image_size: int = 224) -> Dae:
    """A denoising auto-encoder, random or with weights.

    Args:
        pretrained: see `load_dae`.
        noise: see `Dae`, as is `image_size`.
        image_size: pixels.

    Raises:
        UserError: weights that cannot be read or do not fit.
    """
    model = Dae(noise=noise, image_size=image_size)
    if pretrained is not None:
        load_dae(model, pretrained)
    return model


def load_dae(model: nn.Module, path: str) -> None:
    """The weights of a checkpoint of experiment=medvqa_dae, or of a file with the published names (pretrained_ae.pth).

    Raises:
        UserError: they cannot be read or do not fit.
    """
    content = read_checkpoint(Path(path).expanduser())
    about, state = content.get("medclip"), content
    if isinstance(about, Mapping):
        if about.get("kind") != "dae":
            raise UserError(f"{path} is no denoising auto-encoder: give a run of medclip train experiment=medvqa_dae")
        state = {k.removeprefix("model."): v for k, v in content["state_dict"].items() if k.startswith("model.")}
    refuse_unlike(model.state_dict(), state, path)
    model.load_state_dict(state)
