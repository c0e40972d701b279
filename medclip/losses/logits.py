"""Image-text logits, shared by the contrastive losses."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from medclip.types import ClipOutput


def pair_logits(out: ClipOutput) -> Float[Tensor, "n m"]:
    """`scale * image @ text.T (+ bias)`, in float32 at least.

    Autocast would take this product to bfloat16, whose 8 bits put an error of up to 0.25 on a logit near 100: more
    than what separates hard negatives. The product is small beside the towers.
    """
    image, text = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (out.image_features, out.text_features))
    with torch.autocast(image.device.type, enabled=False):
        logits = (out.logit_scale.to(image.dtype) * image) @ text.T
    return logits if out.logit_bias is None else logits + out.logit_bias.to(image.dtype)
