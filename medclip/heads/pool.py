"""The baselines: each patch is classified by two layers, and the slide is their mean or, for each output, the highest.

The mean of the logits is the logits of the mean patch, for the last layer is affine. Max is the instance-level
pooling of Ilse et al. 2018, arXiv:1802.04712, section 2.2.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from medclip.heads.pooled import Pooled, by_rows, pool, shares, some, take
from medclip.heads.scores import embedding


class MeanPool(nn.Module):
    """A head, see medclip/heads/pooled.py; its attention is even.

    Args:
        dim: numbers a patch's features have.
        outputs: logits.
        hidden: width of the first layer.
        dropout: after it.
    """

    extra_names = ()

    def __init__(self, dim: int, outputs: int, *, hidden: int = 512, dropout: float = 0.25) -> None:
        super().__init__()
        self.embed = embedding(dim, hidden, dropout)
        self.classifier = nn.Linear(hidden, outputs)

    def forward(
        self, bag: Float[Tensor, "b n dim"], real: Bool[Tensor, "b n"], label: Float[Tensor, "b c"] | None = None
    ) -> Pooled:
        h = by_rows(self.embed, bag)
        attention = shares(torch.zeros_like(real, dtype=h[0].dtype).unsqueeze(1), real)
        slide = pool(attention, h).squeeze(1)
        return Pooled(self.classifier(slide), attention, slide, slide.new_zeros(len(slide), 0))


class MaxPool(nn.Module):
    """A head, see medclip/heads/pooled.py.

    Its attention is a softmax over the patches' logits, for each output: the highest counts alone, but where the next
    ones are is of interest too.

    Args:
        dim: numbers a patch's features have.
        outputs: logits.
        hidden: width of the first layer.
        dropout: after it.
    """

    extra_names = ()

    def __init__(self, dim: int, outputs: int, *, hidden: int = 512, dropout: float = 0.25) -> None:
        super().__init__()
        self.embed = embedding(dim, hidden, dropout)
        self.classifier = nn.Linear(hidden, outputs)

    def forward(
        self, bag: Float[Tensor, "b n dim"], real: Bool[Tensor, "b n"], label: Float[Tensor, "b c"] | None = None
    ) -> Pooled:
        h = by_rows(self.embed, bag)
        each = torch.cat([self.classifier(part) for part in h], 1)  # (b, n, outputs)
        logits, best = each.masked_fill(~some(real).unsqueeze(2), -torch.inf).max(1)
        slide = take(h, best).mean(1)
        return Pooled(logits, shares(each.detach().transpose(1, 2), real), slide, slide.new_zeros(len(slide), 0))
