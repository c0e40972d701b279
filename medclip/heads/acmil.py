"""ACMIL: several attentions that must differ, each with a classifier, of which none may lean on a few patches.

Zhang, Li, Yang et al. 2024, "Attention-challenging multiple instance learning for whole slide image classification",
ECCV, arXiv:2311.07125, in its form with gated attention. With h_i = ReLU(W x_i), tokens t = 1 … T:

    a_t = softmax_i(score_t(h_i))    branch_t = sum_i a_ti h_i    logits_t = C_t branch_t
    slide = sum_i (1/T sum_t a_ti) h_i                            logits = C slide

- "branches": the mean of the branches' losses (section 3.2);
- "diversity": the mean cosine of two tokens' attention, over all pairs;
- in training, of the `masked` patches that a token looks at most, a share of `rate`, drawn at random, is taken out
  (stochastic top-k instance masking).

With one token there are neither branches nor pairs, and without masking it is ABMIL. The published first layer has no
bias.
"""

from __future__ import annotations

from itertools import combinations
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from medclip.heads.pooled import Pooled, by_rows, pool, shares, some
from medclip.heads.scores import Scores, embedding
from medclip.types import UserError


class Acmil(nn.Module):
    """A head, see medclip/heads/pooled.py; its attention has a row a token, and heat maps show their mean.

    Args:
        dim: numbers a patch's features have.
        outputs: logits.
        tokens: attentions.
        masked: patches of highest attention that masking chooses from; 0: no masking.
        rate: share of them that it takes out.
        hidden: width of h.
        attention: width of the attention network.
        gated: its form with a gate.
        dropout: of h, of the attention network and of what is classified.
        target: what the outputs mean (see medclip/models/mil.py), for the loss of the branches; survival has none.

    Raises:
        UserError: no token, or a rate that could take out all patches.
    """

    extra_names = ("branches", "diversity")

    def __init__(
        self,
        dim: int,
        outputs: int,
        *,
        tokens: int = 5,
        masked: int = 10,
        rate: float = 0.6,
        hidden: int = 512,
        attention: int = 128,
        gated: bool = True,
        dropout: float = 0.0,
        target: Literal["classes", "ordinal", "multilabel", "survival"] = "classes",
    ) -> None:
        super().__init__()
        if tokens < 1:
            raise UserError(f"model.head.tokens is {tokens}: give 1 or more")
        if not 0 <= rate < 1 or masked < 0:
            raise UserError(f"model.head: masked is {masked} and rate {rate}: give 0 or more patches, a share below 1")
        self.masked, self.rate, self.target = masked, rate, target
        self.embed = embedding(dim, hidden, dropout)
        self.scores = Scores(hidden, tokens, hidden=attention, gated=gated, dropout=dropout)
        self.branches = nn.ModuleList(_classifier(hidden, outputs, dropout) for _ in range(tokens if tokens > 1 else 0))
        self.classifier = _classifier(hidden, outputs, dropout)

    def forward(
        self, bag: Float[Tensor, "b n dim"], real: Bool[Tensor, "b n"], label: Float[Tensor, "b c"] | None = None
    ) -> Pooled:
        h = by_rows(self.embed, bag)
        scores = self.scores(h)
        if self.training and self.masked:
            scores = self._mask(scores, some(real))
        attention = shares(scores, real)
        tokens = pool(attention, h)  # (b, tokens, hidden)
        slide = tokens.mean(1)  # the mean attention's sum over the patches
        logits = self.classifier(slide)
        of_branches = diversity = logits.new_zeros(len(bag))
        if self.branches:
            found = torch.stack([branch(tokens[:, t]) for t, branch in enumerate(self.branches)], 1)
            of_branches = found.sum((1, 2)) * 0  # each has a gradient, as training on several ranks needs it
            if label is not None and self.target != "survival":
                of_branches = of_branches + _loss(found, label, self.target)
            diversity = alike(attention)
        return Pooled(logits, attention, slide, torch.stack([of_branches, diversity.to(of_branches.dtype)], 1))

    def _mask(self, scores: Float[Tensor, "b k n"], real: Bool[Tensor, "b n"]) -> Float[Tensor, "b k n"]:
        known = scores.masked_fill(~real.unsqueeze(1), -torch.inf)
        top = known.topk(min(self.masked, scores.shape[2]), 2)
        is_real = top.values > -torch.inf
        # As many as the published code takes: the whole part of rate * patches, of the real ones alone.
        count = (is_real.sum(2, keepdim=True) * self.rate + 1e-6).floor()
        drawn = torch.rand(top.values.shape, device=scores.device).masked_fill(~is_real, 2.0).argsort(2).argsort(2)
        out = torch.zeros_like(scores, dtype=torch.bool).scatter(2, top.indices, drawn < count)
        return scores.masked_fill(out, -torch.inf)


def _classifier(hidden: int, outputs: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Dropout(dropout), nn.Linear(hidden, outputs))


def alike(attention: Float[Tensor, "b k n"]) -> Float[Tensor, " b"]:
    """Mean cosine of the rows, over all pairs of them."""
    pairs = torch.tensor(list(combinations(range(attention.shape[1]), 2)), device=attention.device)
    return F.cosine_similarity(attention[:, pairs[:, 0]], attention[:, pairs[:, 1]], dim=2).mean(1)


def _loss(found: Float[Tensor, "b t c"], label: Float[Tensor, "b c"], target: str) -> Float[Tensor, " b"]:
    """Mean of the branches' losses, which are those that slides have (medclip/losses); what is not known counts 0.

    Cross entropy of classes, the mean binary one of findings. Of grades the sum of the binary ones, each of a grade
    given that those below it were passed (CORN's conditional sets, arXiv:2111.08851).
    """
    found = found.to(torch.promote_types(found.dtype, torch.float32))
    counts = label.isfinite()
    label = label.nan_to_num(0).to(found.dtype)
    each = label.unsqueeze(1).expand_as(found)
    if target == "classes":
        return -(each * found.log_softmax(2)).sum(2).mean(1)
    each = F.binary_cross_entropy_with_logits(found, each, reduction="none").mean(1)  # (b, c)
    if target == "multilabel":
        return (each * counts).sum(1) / counts.sum(1).clamp(min=1)
    return (each * (counts & F.pad(label[:, :-1] == 1, (1, 0), value=True))).sum(1)
