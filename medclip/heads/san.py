"""Stacked attention: the question looks at the objects, adds what it saw to itself, and looks again.

Yang et al. 2016, arXiv:1511.02274, as MEVF (arXiv:1909.11867) uses it. From the question's last state u_0 = q, stack k:

    a = W_q u_(k-1)    x_i = W_v v_i    h_i = tanh(a + x_i)    p = softmax_i(w . drop(h_i))    u_k = r + sum_i p_i x_i

where r is a in the first stack and u_(k-1) after it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class San(nn.Module):
    """(objects (b, v, V), words (b, q, Q)) -> (joint (b, Q), attention (b, stacks, v, q)).

    Only the last of the words' states is read; the attention, which is over objects alone, is spread evenly over the
    words. With one object it has no choice: p = 1.

    Args:
        objects: V.
        words: Q.
        stacks: how often it looks.
        dropout: of h.
    """

    def __init__(self, objects: int, words: int, *, stacks: int = 2, dropout: float = 0.5) -> None:
        super().__init__()
        self.dim = words
        self.ask = nn.ModuleList(nn.Linear(words, words) for _ in range(stacks))
        self.see = nn.ModuleList(nn.Linear(objects, words, bias=False) for _ in range(stacks))
        self.score = nn.ModuleList(nn.Sequential(nn.Dropout(dropout), nn.Linear(words, 1)) for _ in range(stacks))

    def forward(
        self, objects: Float[Tensor, "b v V"], words: Float[Tensor, "b q Q"]
    ) -> tuple[Float[Tensor, "b Q"], Float[Tensor, "b g v q"]]:
        empty = (objects == 0).all(2)
        empty = (empty & ~empty.all(1, keepdim=True)).unsqueeze(2)  # padding, see `Ban`
        question, shares = words[:, -1], []
        for k, (ask, see, score) in enumerate(zip(self.ask, self.see, self.score, strict=True)):
            asked, seen = ask(question), see(objects)
            share = score(torch.tanh(asked.unsqueeze(1) + seen)).masked_fill(empty, -torch.inf).softmax(1)  # (b, v, 1)
            question = (asked if k == 0 else question) + (share * seen).sum(1)
            shares.append(share)
        length = words.shape[1]
        return question, (torch.stack(shares, 1) / length).expand(-1, -1, -1, length)
