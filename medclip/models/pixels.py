"""uint8 pixels to normalised floats, by the statistics of the model or of each row's own data set."""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from medclip.types import Batch, Preprocess

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


class Pixels(nn.Module):
    """(x / 255 - mean) / std as one multiplication and one addition; floats are taken as normalised already.

    `batch["mean"]` and `batch["std"]` (b, 3), where the data declare them, take the place of the model's own. Nothing
    here is part of the state dict, whose keys stay those of published weights.
    """

    def __init__(self, preprocess: Preprocess) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([preprocess.mean]), persistent=False)
        self.register_buffer("std", torch.tensor([preprocess.std]), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def statistics(self, batch: Batch) -> tuple[Float[Tensor, "rows 3"], Float[Tensor, "rows 3"]]:
        """Mean and standard deviation by row (or one row for all), on a 0..1 scale."""
        return batch.get("mean", self.mean), batch.get("std", self.std)  # pyright: ignore

    def normalise(self, image: Shaped[Tensor, "b ... 3"], batch: Batch) -> Float[Tensor, "b ... 3"]:
        """Pixels with the colour in the last dimension, of any shape between."""
        if image.dtype != torch.uint8:
            return image
        mean, std = (x.view(-1, *[1] * (image.ndim - 2), 3) for x in self.statistics(batch))
        # In place on the converted copy: a fused multiply-add from uint8 takes twice as long on CPUs.
        return image.to(mean.dtype).mul_(1 / (255 * std)).sub_(mean / std)

    def normalise_image(self, batch: Batch) -> Float[Tensor, "b 3 h w"]:
        """`batch["image"]` (b, 3, h, w), as `normalise`."""
        image = batch["image"]  # pyright: ignore[reportTypedDictNotRequiredAccess]
        if image.dtype != torch.uint8:
            return image
        mean, std = (x.view(-1, 3, 1, 1) for x in self.statistics(batch))
        return image.to(mean.dtype).mul_(1 / (255 * std)).sub_(mean / std)
