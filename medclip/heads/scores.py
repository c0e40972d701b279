"""What heads on bags are made of: an embedding of each patch, and the attention network of Ilse et al. 2018.

Ilse, Tomczak, Welling 2018, "Attention-based deep multiple instance learning", arXiv:1802.04712. With h_i a patch:

    equation 8   score_i = w . tanh(V h_i)
    equation 9   score_i = w . (tanh(V h_i) * sigmoid(U h_i))    gated

V, U and w have biases, as in all published code; the paper has none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from medclip.heads.pooled import by_rows


def embedding(dim: int, hidden: int, dropout: float = 0.0) -> nn.Sequential:
    """Features (…, dim) -> (…, hidden), not negative."""
    return nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(dropout))


class Scores(nn.Module):
    """Stretches of patches (b, r, dim) -> unnormalised attention (b, k, n).

    Args:
        dim: numbers a patch has.
        k: scores that each patch gets.
        hidden: width of the network.
        gated: equation 9 instead of 8.
        dropout: of tanh and sigmoid, each by itself.
    """

    def __init__(self, dim: int, k: int = 1, *, hidden: int = 256, gated: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.value = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), nn.Dropout(dropout))
        self.gate = nn.Sequential(nn.Linear(dim, hidden), nn.Sigmoid(), nn.Dropout(dropout)) if gated else None
        self.score = nn.Linear(hidden, k)

    def forward(self, parts: Sequence[Float[Tensor, "b r dim"]]) -> Float[Tensor, "b k n"]:
        return torch.cat(by_rows(self._each, parts), 1).transpose(1, 2)

    def _each(self, x: Float[Tensor, "b n dim"]) -> Float[Tensor, "b n k"]:
        value = self.value(x)
        return self.score(value if self.gate is None else value * self.gate(x))
