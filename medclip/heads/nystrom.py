"""Attention among all patches of a slide at a cost that grows with their number, not with its square.

Xiong et al. 2021, "Nyströmformer", arXiv:2102.03902, equation 14, on m landmarks, as TransMIL uses it. With q, k, v of
a head, and q~, k~ the means of m equal stretches of q and k (softmax over the last dimension, q scaled by 1/sqrt(d)):

    F = softmax(q k~^T)   A = softmax(q~ k~^T)   B = softmax(q~ k^T)     attention ~ F A^+ B

A^+ is approached by Z <- Z/4 (13 I - A Z (15 I - A Z (7 I - A Z))) from Z = A^T / (|A|_1 |A|_inf) (equation 16). A
convolution of v along the patches, 33 wide, is added (their section 3.3).

Nothing of the size of n x m is kept: B v is added up over stretches of patches by their log-sum-exp, and what a stretch
needs is made anew in the backward pass. Where there are no more patches than landmarks, attention is exact.

The published code fills up with rows of zeros from the left, to a multiple of m, and attends to them too; here the
stretches are as equal as they can be instead, and there are no such rows. `compat: paper` has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medclip.heads import compat as published
from medclip.heads import pooled

_REACH = 16  # rows that the convolution looks to either side


class NystromLayer(nn.Module):
    """x (n, dim) -> x + W attention(norm(x)).

    Args:
        dim: of the rows.
        heads: of the attention.
        landmarks: m.
        iterations: of the pseudo-inverse.
        dropout: of what is added to x.
        compat: "paper": see above.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        landmarks: int = 256,
        iterations: int = 6,
        dropout: float = 0.1,
        compat: str | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.landmarks, self.iterations = heads, landmarks, iterations
        self.scale = (dim // heads) ** -0.5
        self.paper = published.is_paper(compat, "model.head")
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.near = nn.Conv2d(heads, heads, (2 * _REACH + 1, 1), groups=heads, bias=False)
        self.out = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(dropout))

    def forward(self, x: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
        parts = x.split(pooled.ROWS)
        seen = self._see(parts)
        run = kept(len(parts))
        outs = []
        for i, part in enumerate(parts):
            before = parts[i - 1][-_REACH:] if i else part[:0]
            after = parts[i + 1][:_REACH] if i + 1 < len(parts) else part[:0]
            outs.append(run(self._rows, part, before, after, seen.keys, seen.values))
        return torch.cat(outs)

    def first(self, x: Float[Tensor, "n dim"]) -> tuple[Float[Tensor, " dim"], Float[Tensor, " n"]]:
        """The first row alone, and its attention to all rows: the mean of the heads, without gradient.

        The attention of a head sums to 1, but where it is approached it may be negative.
        """
        parts = x.split(pooled.ROWS)
        seen = self._see(parts)
        row, rest = parts[0][:1], parts[0][1 : 1 + _REACH]
        found = self._rows(row, row[:0], rest, seen.keys, seen.values).squeeze(0)
        with torch.no_grad():
            share = _scores(self._query(row), seen.keys).softmax(2)  # (h, 1, m)
            if seen.inverse is not None:
                share = share @ seen.inverse
                each = [_scores(seen.asking, self._project(part, 1)) - seen.total for part in parts]
                share = torch.cat([share @ scores.exp() for scores in each], 2)
        return found, share.mean((0, 1))

    def _see(self, parts: tuple[Tensor, ...]) -> _Seen:
        n, m = sum(map(len, parts)), self.landmarks
        if n <= m and not self.paper:
            x = torch.cat(parts)
            return _Seen(self._project(x, 1), self._project(x, 2))
        fill = -n % m if self.paper else 0
        run = kept(len(parts))
        which = torch.arange(fill, n + fill, device=parts[0].device) * m // (n + fill)
        count = which.new_full((m,), (n + fill) // m) if self.paper else which.bincount(minlength=m)
        sums = [run(self._add, part, own) for part, own in zip(parts, which.split(pooled.ROWS), strict=True)]
        # The projections have no bias: the mean of what is projected is the projected mean.
        means = torch.stack(sums).sum(0) / count.unsqueeze(1)
        asking, keys = (self._split(F.linear(means, weight)) for weight in self.qkv.weight.chunk(3)[:2])
        asking = asking * self.scale
        gathered, totals = zip(*[run(self._gather, part, asking) for part in parts], strict=True)
        if fill:  # rows of zeros: a score of 0 each, and nothing to give
            gathered += (torch.zeros_like(gathered[0]),)
            totals += (torch.full_like(totals[0], math.log(fill)),)
        total = torch.stack(totals)
        values = (total.softmax(0) * torch.stack(gathered)).sum(0)
        with torch.autocast(values.device.type, enabled=False):  # iterated, which half precision does not bear
            inverse = pinv(_scores(asking, keys).softmax(2), self.iterations)
            return _Seen(keys, inverse @ values, asking, inverse, total.logsumexp(0))

    def _add(self, part: Float[Tensor, "r dim"], which: Tensor) -> Float[Tensor, "m dim"]:
        """The sum of the rows of each landmark's stretch."""
        x = self.norm(part)
        return x.new_zeros(self.landmarks, x.shape[1]).index_add(0, which, x)

    def _gather(
        self, part: Float[Tensor, "r dim"], asking: Float[Tensor, "h m d"]
    ) -> tuple[Float[Tensor, "h m d"], Float[Tensor, "h m 1"]]:
        """softmax(q~ k^T) v over these rows alone, and the log-sum-exp of their scores."""
        scores = _scores(asking, self._project(part, 1))
        return scores.softmax(2) @ self._project(part, 2).to(scores.dtype), scores.logsumexp(2, keepdim=True)

    def _rows(
        self,
        part: Float[Tensor, "r dim"],
        before: Float[Tensor, "p dim"],
        after: Float[Tensor, "s dim"],
        keys: Float[Tensor, "h m d"],
        values: Float[Tensor, "h m d"],
    ) -> Float[Tensor, "r dim"]:
        """The layer's output for rows that lie between others."""
        share = _scores(self._query(part), keys).softmax(2)
        own = F.pad(
            self._project(torch.cat([before, part, after]), 2), (0, 0, _REACH - len(before), _REACH - len(after))
        )
        y = share.to(values.dtype) @ values + self.near(own.unsqueeze(0)).squeeze(0)
        return part + self.out(y.transpose(0, 1).flatten(1))

    def _query(self, x: Float[Tensor, "r dim"]) -> Float[Tensor, "h r d"]:
        return self._project(x, 0) * self.scale

    def _project(self, x: Float[Tensor, "r dim"], which: int) -> Float[Tensor, "h r d"]:
        """q, k or v."""
        return self._split(F.linear(self.norm(x), self.qkv.weight.chunk(3)[which]))

    def _split(self, x: Float[Tensor, "r dim"]) -> Float[Tensor, "h r d"]:
        return x.unflatten(1, (self.heads, -1)).transpose(0, 1)


class _Seen(NamedTuple):
    """What every row attends to: keys, and what each of them gives; where attention is approached, A^+ B v.

    And what makes weights of landmarks weights of rows: q~, A^+, the log-sum-exp of each row of q~ k^T.
    """

    keys: Float[Tensor, "h m d"]
    values: Float[Tensor, "h m d"]
    asking: Any = None
    inverse: Float[Tensor, "h m m"] | None = None
    total: Any = None


def _scores(queries: Float[Tensor, "h a d"], keys: Float[Tensor, "h b d"]) -> Float[Tensor, "h a b"]:
    scores = queries @ keys.transpose(1, 2)
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def pinv(a: Float[Tensor, "h m m"], iterations: int) -> Float[Tensor, "h m m"]:
    """The pseudo-inverse of each matrix, approached; as published, all heads start from the largest norms of them."""
    z = a.transpose(1, 2) / (a.abs().sum(2).amax() * a.abs().sum(1).amax())
    one = torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
    for _ in range(iterations):
        az = a @ z
        z = z @ (13 * one - az @ (15 * one - az @ (7 * one - az))) / 4
    return z


def kept(parts: int) -> Callable[..., Any]:
    """How a function of a stretch is called: where there are several, what it keeps is made anew."""
    return partial(checkpoint, use_reentrant=False) if parts > 1 else lambda function, *given: function(*given)
