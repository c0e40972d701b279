"""TransMIL: a slide's patches attend to each other, with a convolution between that tells them where they are.

Shao et al. 2021, "TransMIL: transformer based correlated multiple instance learning", NeurIPS, arXiv:2106.00908:

    h = ReLU(W x), the first patches once more up to the next square number, a class token before them
    h = layer(h);  h = PPEG(h);  h = layer(h);  slide = norm(h)_class

Layers are of Nyström attention (medclip/heads/nystrom.py: 8 heads, 256 landmarks, 6 iterations). PPEG takes the
patches, in their order, for the pixels of a square: h + conv7(h) + conv5(h) + conv3(h), each by channel. So their order
counts: keep that in which they were extracted.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from medclip.heads import pooled
from medclip.heads.nystrom import NystromLayer, kept
from medclip.heads.pooled import Pooled, by_rows, some
from medclip.heads.scores import embedding
from medclip.types import UserError

_EDGE = 3  # rows and columns that PPEG looks to each side


class TransMil(nn.Module):
    """A head, see medclip/heads/pooled.py.

    Its attention is the class token's in the last layer, the mean of the heads; what the approximation makes negative
    is 0.

    Args:
        dim: numbers a patch's features have.
        outputs: logits.
        hidden: width of h.
        heads: of the attention.
        landmarks: of the attention.
        iterations: of its pseudo-inverse.
        dropout: in both layers.
        compat: "paper": as the published code attends to rows of zeros.

    Raises:
        UserError: heads that do not divide the width.
    """

    extra_names = ()

    def __init__(
        self,
        dim: int,
        outputs: int,
        *,
        hidden: int = 512,
        heads: int = 8,
        landmarks: int = 256,
        iterations: int = 6,
        dropout: float = 0.1,
        compat: str | None = None,
    ) -> None:
        super().__init__()
        if hidden % heads:
            raise UserError(f"model.head.hidden={hidden} must be a multiple of model.head.heads={heads}")
        self.embed = embedding(dim, hidden)
        self.token = nn.Parameter(torch.randn(1, hidden))
        self.layers = nn.ModuleList(
            NystromLayer(
                hidden, heads=heads, landmarks=landmarks, iterations=iterations, dropout=dropout, compat=compat
            )
            for _ in range(2)
        )
        self.position = Ppeg(hidden)
        self.norm = nn.LayerNorm(hidden)
        self.classifier = nn.Linear(hidden, outputs)

    def forward(
        self, bag: Float[Tensor, "b n dim"], real: Bool[Tensor, "b n"], label: Float[Tensor, "b c"] | None = None
    ) -> Pooled:
        slides, attention = [], []
        for patches, own in zip(bag, some(real), strict=True):
            slide, share = self._one(patches if own.all() else patches[own])
            slides.append(slide)
            attention.append(share.new_zeros(len(own)).masked_scatter(own, share))
        slide = torch.stack(slides)
        return Pooled(self.classifier(slide), torch.stack(attention).unsqueeze(1), slide, slide.new_zeros(len(bag), 0))

    def _one(self, patches: Float[Tensor, "n dim"]) -> tuple[Float[Tensor, " hidden"], Float[Tensor, " n"]]:
        n = len(patches)
        side = math.isqrt(n - 1) + 1
        again = side * side - n
        h = [part.squeeze(0) for part in by_rows(self.embed, patches.unsqueeze(0))]
        h = torch.cat([self.token.to(h[0].dtype), *h, h[0][:again]])
        h = self.layers[0](h)
        h = self.position(h, side)
        found, share = self.layers[1].first(h)  # pyright: ignore[reportCallIssue]
        share = share.to(torch.promote_types(share.dtype, torch.float32))
        share, twice = share[1 : n + 1].clone(), share[n + 1 :]
        share[:again] += twice
        share = share.clamp(min=0)
        return self.norm(found), share / share.sum().clamp(min=torch.finfo(share.dtype).tiny)


class Ppeg(nn.Module):
    """The class token and the patches of a square (1 + side², dim) -> the same, the patches with their surroundings.

    Three convolutions and the identity are one kernel, so that a slide's patches are gone through once.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(dim, dim, size, padding=size // 2, groups=dim) for size in (7, 5, 3)
        )

    def forward(self, x: Float[Tensor, "n dim"], side: int) -> Float[Tensor, "n dim"]:
        kernel, bias = 0, 0
        for k, own in enumerate(self.convolutions):
            kernel = kernel + F.pad(own.weight, (k, k, k, k))  # pyright: ignore
            bias = bias + own.bias  # pyright: ignore
        kernel = kernel + F.pad(torch.ones_like(bias)[:, None, None, None], (3, 3, 3, 3))  # pyright: ignore
        bands = x[1:].unflatten(0, (side, side)).split(max(_EDGE, pooled.ROWS // side))
        run = kept(len(bands))
        seen = []
        for i, band in enumerate(bands):
            above = bands[i - 1][-_EDGE:] if i else band[:0]
            below = bands[i + 1][:_EDGE] if i + 1 < len(bands) else band[:0]
            seen.append(run(self._band, above, band, below, kernel, bias).to(x.dtype))
        return torch.cat([x[:1], *seen])

    def _band(self, above: Tensor, band: Tensor, below: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
        """Rows of the square (r, side, dim), between those above and below, to patches (r * side, dim)."""
        rows = torch.cat([above, band, below]).permute(2, 0, 1).unsqueeze(0)
        rows = F.pad(rows, (_EDGE, _EDGE, _EDGE - len(above), _EDGE - len(below)))
        return F.conv2d(rows, kernel, bias, groups=len(bias)).squeeze(0).permute(1, 2, 0).flatten(0, 1)
