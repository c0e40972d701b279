"""A small convolutional net that meta-learning has made quick to adapt: MEVF's first eye, and PubMedCLIP's baseline.

Nguyen et al. 2019, arXiv:1909.11867, with the net of Finn et al. 2017, arXiv:1703.03400: four times a 3x3 convolution
to 64 channels with stride 2, ReLU and batch norm (in this order, as published), then the mean over the 6 x 6 places of
a grey picture of 84 x 84 pixels. How it is trained is `medclip.tasks.maml`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from medclip.models.encoder import refuse_unlike
from medclip.models.grey import Grey
from medclip.models.weights import read_checkpoint
from medclip.types import Batch, Preprocess, UserError

SIZE = 84  # pixels, square
WIDTH = 64


class MamlNet(nn.Module):
    """Grey pictures -> features (b, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(n, WIDTH, 3, stride=2, padding=1) for n in (1, WIDTH, WIDTH, WIDTH))
        self.norms = nn.ModuleList(nn.BatchNorm2d(WIDTH, eps=1e-5, momentum=0.05) for _ in range(4))

    def forward(self, grey: Float[Tensor, "b 1 84 84"]) -> Float[Tensor, "b 64"]:
        x = grey
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(F.relu(conv(x)))
        return x.mean((2, 3))


class Maml(nn.Module):
    """`Batch` -> logits (b, ways) of an episode's classes, which mean something after some steps on its shots only.

    Args:
        ways: classes of an episode.
        image_size: pixels of the images that it is handed, before they are made grey and small. 224 is what it gets
            beside most CLIPs.
    """

    tokenizer = None

    def __init__(self, ways: int, *, image_size: int = 224) -> None:
        super().__init__()
        if ways < 2:
            raise UserError(f"model.ways is {ways}: an episode has 2 classes or more")
        self.ways = ways
        self.preprocess = Preprocess(size=(image_size, image_size))
        self.grey = Grey(SIZE)
        self.net = MamlNet()
        self.head = nn.Linear(WIDTH, ways)

    @property
    def description(self) -> dict[str, Any]:
        """Plain data that says what it is, without its weights."""
        return {"kind": "maml", "ways": self.ways, "preprocess_cfg": self.preprocess.as_dict()}

    def prepare(self, image: Shaped[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 84 84"]:
        """What an inner loop looks at several times: `forward` takes such pictures as they are."""
        return self.grey({"image": image})

    def forward(self, batch: Batch) -> Float[Tensor, "b ways"]:
        return self.head(self.net(self.grey(batch)))


def build_maml(ways: int, *, pretrained: str | None = None, image_size: int = 224) -> Maml:
    """A net to be meta-learned.

    Args:
        ways: classes of an episode.
        pretrained: start the net, but for its head, from a checkpoint of experiment=medvqa_maml.
        image_size: see `Maml`.

    Raises:
        UserError: weights that cannot be read or do not fit.
    """
    model = Maml(ways, image_size=image_size)
    if pretrained is not None:
        load_maml(model.net, pretrained)
    return model


def load_maml(net: MamlNet, path: str) -> None:
    """The weights of a checkpoint of experiment=medvqa_maml, without its head.

    Raises:
        UserError: they cannot be read or are no such net's.
    """
    file = Path(path).expanduser()
    if file.suffix == ".weights":
        raise UserError(
            f"{path} is a pickle, which may hold code: train the net (medclip train experiment=medvqa_maml)"
        )
    content = read_checkpoint(file)
    about = content.get("medclip")
    if not isinstance(about, Mapping) or about.get("kind") != "maml":
        raise UserError(f"{path} is no meta-learned net: give a run of medclip train experiment=medvqa_maml")
    state: dict[str, Tensor] = {
        k.removeprefix("model.net."): v for k, v in content["state_dict"].items() if k.startswith("model.net.")
    }
    refuse_unlike(net.state_dict(), state, path)
    net.load_state_dict(state)
