"""MEVF: one classifier over all answers on the fusion of image and question.

Nguyen et al. 2019, arXiv:1909.11867; PubMedCLIP (arXiv:2112.13906) puts a CLIP in the place of its MAML encoder.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from medclip.heads.judged import Judged, all_own
from medclip.heads.weighted import classifier
from medclip.types import Asked, QuestionEncoder

Fusion = Callable[..., nn.Module]  # (objects, words) -> module of `Ban`'s face


class Mevf(nn.Module):
    """Fusion, then a layer of twice the width.

    Args:
        objects: numbers a visual object has.
        questions: what encodes the words.
        answers: number of answers.
        closed: not used: all answers compete.
        fusion: `Ban` or `San`, without its sizes.
        dropout: before the last layer.
    """

    routed = False

    def __init__(
        self,
        objects: int,
        questions: QuestionEncoder,
        answers: int,
        closed: int = 0,
        *,
        fusion: Fusion,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.fusion = fusion(objects, questions.dim)
        self.classifier = classifier(questions.dim, answers, dropout)

    def forward(
        self,
        objects: Float[Tensor, "b v V"],
        asked: Asked,
        text: Int64[Tensor, "b L"],
        closed: Bool[Tensor, " b"] | None = None,
    ) -> Judged:
        joint, attention = self.fusion(objects, asked.states)
        logits = self.classifier(joint)
        return Judged(logits, all_own(logits), attention)
