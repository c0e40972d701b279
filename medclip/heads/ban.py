"""Bilinear attention: every word looks at every object, by several glimpses, each of which adds to the question.

Kim et al. 2018, arXiv:1805.07932, as MEVF (arXiv:1909.11867) and QCR (Zhan et al., ACM MM 2020) use it. With objects
v_i and words q_j, x' = ReLU(W drop(x)) of 3 H channels, and o the product by channels:

    logit_g(i, j) = sum_c h_gc v'_ic q'_jc        A_g = softmax over all (i, j)
    b_g = sum_ij A_g(i, j) (v''_i o q''_j)        q_j <- q_j + F_g b_g        joint = sum_j q_j

with weights of its own (W'' of H channels, F_g) for each glimpse, whose q are those that the glimpse before left. The
published code adds a bias to the logits of each glimpse; softmax takes it out again, so there is none here.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from medclip.heads.weighted import rectified, weighted

_WIDE = 3  # channels of the attention, in multiples of the question's


class Ban(nn.Module):
    """(objects (b, v, V), words (b, q, Q)) -> (joint (b, Q), attention (b, glimpses, v, q)).

    Args:
        objects: V.
        words: Q.
        glimpses: how often it looks; MEVF 2, QCR 10.
        dropout: of objects and words before their layers.
        attention_dropout: of the objects' channels in the attention.
    """

    def __init__(
        self, objects: int, words: int, *, glimpses: int = 2, dropout: float = 0.2, attention_dropout: float = 0.5
    ) -> None:
        super().__init__()
        self.dim = words
        self.attention = weight_norm(
            _Attention(objects, words, glimpses, dropout, attention_dropout),
            "kernel",
            dim=None,  # pyright: ignore
        )
        self.objects = nn.ModuleList(rectified(objects, words, dropout) for _ in range(glimpses))
        self.words = nn.ModuleList(rectified(words, words, dropout) for _ in range(glimpses))
        self.onward = nn.ModuleList(nn.Sequential(nn.Dropout(dropout), weighted(words, words)) for _ in range(glimpses))

    def forward(
        self, objects: Float[Tensor, "b v V"], words: Float[Tensor, "b q Q"]
    ) -> tuple[Float[Tensor, "b Q"], Float[Tensor, "b g v q"]]:
        attention = self.attention(objects, words)
        for g, (see, read, onward) in enumerate(zip(self.objects, self.words, self.onward, strict=True)):
            seen = (attention[:, g] @ read(words) * see(objects)).sum(1)
            words = words + onward(seen).unsqueeze(1)
        return words.sum(1), attention


class _Attention(nn.Module):
    def __init__(self, objects: int, words: int, glimpses: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.objects = rectified(objects, _WIDE * words, dropout)
        self.words = rectified(words, _WIDE * words, dropout)
        self.dropout = nn.Dropout(attention_dropout)
        self.kernel = nn.Parameter(torch.randn(glimpses, _WIDE * words))

    def forward(self, objects: Float[Tensor, "b v V"], words: Float[Tensor, "b q Q"]) -> Float[Tensor, "b g v q"]:
        seen = self.dropout(self.objects(objects)).unsqueeze(1) * self.kernel[:, None]  # (b, g, v, c)
        logits = seen @ self.words(words).transpose(1, 2).unsqueeze(1)
        # Objects of zeros are padding; where there is no other, a softmax over nothing would be NaN.
        empty = (objects == 0).all(2)
        empty = empty & ~empty.all(1, keepdim=True)
        logits = logits.masked_fill(empty[:, None, :, None], -torch.inf)
        return logits.flatten(2).softmax(-1).view_as(logits)
