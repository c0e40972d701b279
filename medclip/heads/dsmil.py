"""DSMIL: the patch of the highest score, and all patches by how like it they are.

Li, Li, Eliceiri 2021, "Dual-stream multiple instance learning", arXiv:2011.08939. For each output c:

    s_ci = w_c . x_i + b_c    m = argmax_i s_ci             the critical patch
    q_i = Q x_i               a_ci = softmax_i(q_i . q_m / sqrt(|q|))
    slide_c = sum_i a_ci v_i  logits = (s_m + W slide) / 2   equation 8

with W over the slides of all outputs together. The published trainer takes the loss of each stream, and their mean; the
logits here are the mean of the streams, as in the paper.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from medclip.heads.pooled import Pooled, by_rows, pool, shares, some, widened


class Dsmil(nn.Module):
    """A head, see medclip/heads/pooled.py.

    Args:
        dim: numbers a patch's features have.
        outputs: logits.
        query: width of q.
        nonlinear: q by two layers, with ReLU and tanh, instead of one.
        values: v by a layer of the same width, with ReLU, instead of the features as they are.
        dropout: of the features before that layer.
    """

    extra_names = ()

    def __init__(
        self,
        dim: int,
        outputs: int,
        *,
        query: int = 128,
        nonlinear: bool = True,
        values: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.instance = nn.Linear(dim, outputs)
        more = (nn.ReLU(), nn.Linear(query, query), nn.Tanh()) if nonlinear else ()
        self.query = nn.Sequential(nn.Linear(dim, query), *more)
        self.value = nn.Sequential(nn.Dropout(dropout), nn.Linear(dim, dim), nn.ReLU()) if values else None
        self.classifier = nn.Linear(outputs * dim, outputs)

    def forward(
        self, bag: Float[Tensor, "b n dim"], real: Bool[Tensor, "b n"], label: Float[Tensor, "b c"] | None = None
    ) -> Pooled:
        each = torch.cat(by_rows(self.instance, bag), 1)  # (b, n, outputs)
        highest, critical = each.masked_fill(~some(real).unsqueeze(2), -torch.inf).max(1)
        asking = self.query(widened(bag[torch.arange(len(bag), device=bag.device)[:, None], critical]))
        queries = torch.cat(by_rows(self.query, bag), 1)
        attention = shares(asking @ queries.transpose(1, 2) / queries.shape[2] ** 0.5, real)
        slides = pool(attention, by_rows(nn.Identity() if self.value is None else self.value, bag))
        logits = (highest + self.classifier(slides.flatten(1))) / 2
        return Pooled(logits, attention, slides.mean(1), slides.new_zeros(len(slides), 0))
