"""Positions of a grid of patches: fixed sines and cosines in two dimensions, and learnt ones taken to another grid.

He et al. 2022, arXiv:2111.06377, appendix A.1 ("sine-cosine version"); in one dimension Vaswani et al. 2017,
arXiv:1706.03762, section 3.5, with the sines first and the cosines after them:

    e(p) = [sin(p * w_0) … sin(p * w_{d/4-1}), cos(p * w_0) … cos(p * w_{d/4-1})],  w_i = 10000^(-4 i / d)

The first half of a position's d numbers is e(column), the second e(row): published MAE weights have this order.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from medclip.types import UserError


def sincos_positions(dim: int, grid: tuple[int, int]) -> Float[Tensor, "1 tokens dim"]:
    """Positions of a class token (zeros) and of the patches of a (rows, columns) grid, row by row.

    Raises:
        UserError: `dim` is no multiple of 4.
    """
    if dim % 4:
        raise UserError(f"sine-cosine positions need a width that is a multiple of 4, not {dim}")
    rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    omega = 10000.0 ** (-np.arange(dim // 4) / (dim / 4))  # float64: what published weights were rounded from
    angles = [np.outer(place, omega) for place in (columns, rows)]
    patches = np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1)
    return torch.from_numpy(np.concatenate([np.zeros((1, dim)), patches])).float()[None]


def fit_positions(embedding: Float[Tensor, "1 tokens dim"], grid: tuple[int, int]) -> Float[Tensor, "1 tokens dim"]:
    """A class token's and a square grid's positions, taken to another grid: bicubic, as MAE's fine-tuning does."""
    if embedding.shape[1] == 1 + grid[0] * grid[1]:
        return embedding
    return resample_abs_pos_embed(embedding, list(grid), num_prefix_tokens=1, antialias=False)
