"""Weight-normalised linear layers, as bilinear attention networks use them: one gain for the whole matrix.

Kim et al. 2018, arXiv:1805.07932; Salimans and Kingma 2016, arXiv:1602.07868: W = g * V / ||V||, with the norm over all
of V and a single g.
"""

from __future__ import annotations

from torch import nn
from torch.nn.utils.parametrizations import weight_norm


def weighted(inputs: int, outputs: int) -> nn.Linear:
    """A weight-normalised linear layer."""
    layer = nn.Linear(inputs, outputs)
    weight_norm(layer, dim=None)  # pyright: ignore[reportArgumentType]
    return layer


def rectified(inputs: int, outputs: int, dropout: float) -> nn.Sequential:
    """Dropout, a weight-normalised linear layer, ReLU."""
    return nn.Sequential(nn.Dropout(dropout), weighted(inputs, outputs), nn.ReLU())


def classifier(inputs: int, answers: int, dropout: float = 0.5) -> nn.Sequential:
    """From the joint vector (b, inputs) to logits (b, answers), by one layer of twice the width."""
    return nn.Sequential(weighted(inputs, 2 * inputs), nn.ReLU(), nn.Dropout(dropout), weighted(2 * inputs, answers))
