"""Whether a question is closed or open, from its words alone: what QCR routes by.

Zhan et al. 2020 (QCR), section 3.2: gated attention over the states of a GRU, then three layers.
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from medclip.heads.compat import dropout, is_paper
from medclip.heads.gated import GatedWords, xavier
from medclip.heads.judged import Judged, all_own
from medclip.types import Asked, QuestionEncoder, UserError


class QuestionType(nn.Module):
    """Logits of closed and open; the visual objects are not looked at.

    Args:
        objects: not used.
        questions: the encoder whose words it judges.
        answers: 2, closed and open.
        closed: not used.
        compat: "paper" keeps dropout at work in tests, so that the routing is random.
    """

    routed = False

    def __init__(
        self, objects: int, questions: QuestionEncoder, answers: int = 2, closed: int = 0, *, compat: str | None = None
    ) -> None:
        super().__init__()
        if answers != 2:
            raise UserError(f"a question is closed or open, but there are {answers} answers: say answers=[closed,open]")
        self.gate = GatedWords(questions.width, questions.dim)
        self.layers = nn.Sequential(
            xavier(questions.dim, 256),
            nn.ReLU(),
            xavier(256, 64),
            dropout(is_paper(compat, "question_type")),
            nn.ReLU(),
            xavier(64, 2),
        )

    def forward(
        self,
        objects: Float[Tensor, "b v V"] | None,
        asked: Asked,
        text: Int64[Tensor, "b L"],
        closed: Bool[Tensor, " b"] | None = None,
    ) -> Judged:
        vector, share = self.gate(asked)
        logits = self.layers(vector)
        return Judged(logits, all_own(logits), share[:, None, None])
