"""ABMIL: the slide is the mean of its patches, weighted by an attention network.

Ilse, Tomczak, Welling 2018, arXiv:1802.04712, equation 7, on features that one layer has made fit:

    h_i = ReLU(W x_i)    a = softmax_i(score(h_i))    slide = sum_i a_i h_i    logits = C slide
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor, nn

from medclip.heads.pooled import Pooled, by_rows, pool, shares
from medclip.heads.scores import Scores, embedding


class Abmil(nn.Module):
    """A head, see medclip/heads/pooled.py.

    Args:
        dim: numbers a patch's features have.
        outputs: logits.
        hidden: width of h.
        attention: width of the attention network.
        gated: its form with a gate.
        dropout: of h, of the attention network and of the slide.
    """

    extra_names = ()

    def __init__(
        self,
        dim: int,
        outputs: int,
        *,
        hidden: int = 512,
        attention: int = 128,
        gated: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embed = embedding(dim, hidden, dropout)
        self.scores = Scores(hidden, hidden=attention, gated=gated, dropout=dropout)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(hidden, outputs))

    def forward(
        self, bag: Float[Tensor, "b n dim"], real: Bool[Tensor, "b n"], label: Float[Tensor, "b c"] | None = None
    ) -> Pooled:
        h = by_rows(self.embed, bag)
        attention = shares(self.scores(h), real)
        slide = pool(attention, h).squeeze(1)
        return Pooled(self.classifier(slide), attention, slide, slide.new_zeros(len(slide), 0))
