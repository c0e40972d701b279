"""One vector out of a question's words: gated attention over them.

QCR (Zhan et al. 2020, "Medical visual question answering via conditional reasoning", ACM MM), section 3.2. With w_j
the embedded word and q_j the state after it:

    g_j = tanh(W_1 [w_j; q_j]) o sigmoid(W_2 [w_j; q_j])    a = softmax_j(w . g_j)    vector = sum_j a_j q_j

over all positions, padded ones too, as published.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from medclip.types import Asked


class GatedWords(nn.Module):
    """`Asked` -> (vector (b, dim), attention (b, q)).

    Args:
        width: of an embedded word.
        dim: of a state.
    """

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.tanh_gate = xavier(width + dim, dim)
        self.sigmoid_gate = xavier(width + dim, dim)
        self.score = xavier(dim, 1)

    def forward(self, asked: Asked) -> tuple[Float[Tensor, "b dim"], Float[Tensor, "b q"]]:
        both = torch.cat([asked.embedded, asked.states], -1)
        gated = torch.tanh(self.tanh_gate(both)) * torch.sigmoid(self.sigmoid_gate(both))
        share = self.score(gated).squeeze(-1).softmax(-1)
        return (share.unsqueeze(1) @ asked.states).squeeze(1), share


def xavier(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer with Xavier's uniform weights and no offset."""
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
