"""CLAM: attention as ABMIL's, whose highest and lowest patches also teach a classifier of patches for each class.

Lu et al. 2021, "Data-efficient and weakly supervised computational pathology on whole-slide images", Nature Biomedical
Engineering 5:555, arXiv:2004.09666. With h_i = ReLU(W x_i), and one attention (CLAM-SB) or one a class (CLAM-MB):

    slide_c = sum_i a_ci h_i    logit_c = w_c . slide_c + b_c

Instance loss of a slide's class: its k patches of highest attention are positive, its k of lowest attention negative,
to a classifier of two outputs of the class's own; with `subtyping`, where a patch shows one class at most, the k
highest are also negative to the classifiers of the other classes, and the losses are averaged over the classes. The
loss is the smooth top-1 SVM (Berrada, Zisserman, Kumar 2018, arXiv:1802.07595; margin and temperature 1), log sum_j
exp(s_j + [j is wrong]) - s_right, or cross entropy, which has no margin.

The paper weighs the loss of slides by 0.7 and `extra` by 0.3. Beyond it: several classes at once (their mean), unknown
ones (left out), bags of fewer than k patches (all of them).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from medclip.heads.pooled import Pooled, by_rows, pool, shares, some, take
from medclip.heads.scores import Scores, embedding
from medclip.types import UserError

_HIDDEN = 512
_SIZES = {"small": 256, "big": 384}  # widths of the attention network
_MARGINS = {"svm": 1.0, "ce": 0.0}


class Clam(nn.Module):
    """A head, see medclip/heads/pooled.py; its extra loss is "instances".

    Args:
        dim: numbers a patch's features have.
        outputs: logits.
        branches: "one" attention (CLAM-SB), or one for "each" output (CLAM-MB).
        size: "small" or "big", of the attention network.
        gated: its form with a gate.
        dropout: of h and of the attention network.
        k_sample: patches that are taken as positive, and as negative.
        instance_loss: "svm" or "ce".
        subtyping: the classes exclude each other in a patch.

    Raises:
        UserError: an unknown word, or no patches to sample.
    """

    extra_names = ("instances",)

    def __init__(
        self,
        dim: int,
        outputs: int,
        *,
        branches: Literal["one", "each"] = "one",
        size: Literal["small", "big"] = "small",
        gated: bool = True,
        dropout: float = 0.25,
        k_sample: int = 8,
        instance_loss: Literal["svm", "ce"] = "svm",
        subtyping: bool = False,
    ) -> None:
        super().__init__()
        known = {"branches": ("one", "each"), "size": tuple(_SIZES), "instance_loss": tuple(_MARGINS)}
        for name, value in {"branches": branches, "size": size, "instance_loss": instance_loss}.items():
            if value not in known[name]:
                raise UserError(f"model.head.{name}={value} is unknown: one of {', '.join(known[name])}")
        if k_sample < 1:
            raise UserError(f"model.head.k_sample is {k_sample}: give 1 or more patches")
        self.each = branches == "each"
        self.k_sample, self.margin, self.subtyping = k_sample, _MARGINS[instance_loss], subtyping
        self.embed = embedding(dim, _HIDDEN, dropout)
        self.scores = Scores(_HIDDEN, outputs if self.each else 1, hidden=_SIZES[size], gated=gated, dropout=dropout)
        self.classifier = nn.Linear(_HIDDEN, outputs)
        self.instances = nn.Linear(_HIDDEN, 2 * outputs)  # of each output: no, yes

    def forward(
        self, bag: Float[Tensor, "b n dim"], real: Bool[Tensor, "b n"], label: Float[Tensor, "b c"] | None = None
    ) -> Pooled:
        h = by_rows(self.embed, bag)
        scores = self.scores(h)
        attention = shares(scores, real)
        slides = pool(attention, h)  # (b, 1 or outputs, hidden)
        if self.each:
            logits = (slides * self.classifier.weight).sum(2) + self.classifier.bias
        else:
            logits = self.classifier(slides.squeeze(1))
        extra = logits.new_zeros(len(bag)) if label is None else self._teach(h, scores.detach(), some(real), label)
        return Pooled(logits, attention, slides.mean(1), extra.unsqueeze(1))

    def _teach(
        self,
        h: Sequence[Float[Tensor, "b r hidden"]],
        scores: Float[Tensor, "b k n"],
        real: Bool[Tensor, "b n"],
        label: Float[Tensor, "b outputs"],
    ) -> Float[Tensor, " b"]:
        high, is_high = self._judge(h, scores, real)
        low, is_low = self._judge(h, -scores, real)
        # Every classifier is asked about every bag, and what does not count is 0: all weights have a gradient, as
        # training on several ranks needs it.
        count = is_high.sum(2).clamp(min=1)
        of_class = ((self._lose(high, 1) * is_high).sum(2) + (self._lose(low, 0) * is_low).sum(2)) / (2 * count)
        inside, outside = (label == 1).to(of_class.dtype), (label == 0).to(of_class.dtype)
        if not self.subtyping:
            return (of_class * inside).sum(1) / inside.sum(1).clamp(min=1)
        of_others = (self._lose(high, 0) * is_high).sum(2) / count
        return (of_class * inside + of_others * outside).sum(1) / (inside + outside).sum(1).clamp(min=1)

    def _judge(
        self, h: Sequence[Float[Tensor, "b r hidden"]], scores: Float[Tensor, "b k n"], real: Bool[Tensor, "b n"]
    ) -> tuple[Float[Tensor, "b outputs s 2"], Bool[Tensor, "b k s"]]:
        """What each classifier says of the patches of the highest scores, and which of these are no padding."""
        found = scores.masked_fill(~real.unsqueeze(1), -torch.inf).topk(min(self.k_sample, real.shape[1]), 2)
        patches = take(h, found.indices.flatten(1)).unflatten(1, found.indices.shape[1:])  # (b, k, s, hidden)
        said = self.instances(patches).unflatten(3, (-1, 2))  # (b, k, s, outputs, 2): by each output's classifier
        if not self.each:
            return said.squeeze(1).transpose(1, 2), found.values > -torch.inf
        return said.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2), found.values > -torch.inf

    def _lose(self, said: Float[Tensor, "b outputs s 2"], right: int) -> Float[Tensor, "b outputs s"]:
        said = said.to(torch.promote_types(said.dtype, torch.float32))
        margin = said.new_full((2,), self.margin)
        margin[right] = 0.0
        return (said + margin).logsumexp(3) - said[..., right]
