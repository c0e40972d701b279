"""QCR: closed and open questions each have a branch, and the question conditions what is read off the fusion.

Zhan et al. 2020, "Medical visual question answering via conditional reasoning" (ACM MM), section 3:

    f = fusion_branch(objects, words)    r = MLP(gated attention over the words)    logits = classifier_branch(f o r)

r has a question encoder of its own. Which branch a row takes is told from outside: in training by its true type, in a
test by `QuestionType`. Each row goes through its own branch alone. A branch that no row takes sees one row whose
logits count for nothing, so that all weights have a gradient (of 0) on every rank.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from medclip.heads import compat as published
from medclip.heads.gated import GatedWords, xavier
from medclip.heads.judged import Judged
from medclip.heads.mevf import Fusion
from medclip.heads.weighted import classifier
from medclip.types import Asked, QuestionEncoder


class Qcr(nn.Module):
    """Two branches and the reasoning vector.

    Args:
        objects: numbers a visual object has.
        questions: what encodes the words; r(q) gets another one like it.
        answers: number of answers, closed ones first.
        closed: how many of them are closed.
        fusion: `Ban` or `San`, without its sizes.
        dropout: before the last layers.
        compat: "paper" keeps the dropout within r(q) at work in tests.
    """

    routed = True

    def __init__(
        self,
        objects: int,
        questions: QuestionEncoder,
        answers: int,
        closed: int,
        *,
        fusion: Fusion,
        dropout: float = 0.5,
        compat: str | None = None,
    ) -> None:
        super().__init__()
        self.reasoning = Reasoning(questions.another(), paper=published.is_paper(compat, "model.head"))
        sizes = (closed, answers - closed)
        self.fusions = nn.ModuleList(fusion(objects, questions.dim) for _ in sizes)
        self.classifiers = nn.ModuleList(classifier(questions.dim, size, dropout) for size in sizes)
        self.columns = (slice(0, closed), slice(closed, answers))

    def forward(
        self,
        objects: Float[Tensor, "b v V"],
        asked: Asked,
        text: Int64[Tensor, "b L"],
        closed: Bool[Tensor, " b"] | None = None,
    ) -> Judged:
        assert closed is not None, "QCR must be told which questions are closed"
        reason = self.reasoning(text)
        logits = attention = None
        own = torch.zeros(len(text), self.columns[1].stop, dtype=torch.bool, device=text.device)
        parts = zip(self.fusions, self.classifiers, self.columns, (closed, ~closed), strict=True)
        for fusion, classify, columns, taken in parts:
            rows = taken.nonzero().squeeze(1)
            counts = 1.0 if len(rows) else 0.0
            rows = rows if len(rows) else rows.new_zeros(1)
            joint, seen = fusion(objects[rows], asked.states[rows])
            found = classify(joint * reason[rows]) * counts
            if logits is None or attention is None:
                logits = found.new_zeros(own.shape)
                attention = seen.new_zeros(len(text), *seen.shape[1:])
            whole = found.new_zeros(len(rows), own.shape[1])
            whole[:, columns] = found
            logits = logits.index_add(0, rows, whole)
            attention = attention.index_add(0, rows, seen * counts)
            own[taken, columns] = True
        assert logits is not None and attention is not None
        return Judged(logits, own, attention)


class Reasoning(nn.Module):
    """Token ids (b, L) -> r(q) (b, dim).

    Args:
        questions: an encoder of its own.
        paper: see `Qcr`.
    """

    def __init__(self, questions: QuestionEncoder, *, paper: bool = False) -> None:
        super().__init__()
        assert isinstance(questions, nn.Module)
        self.questions = questions
        dim = questions.dim
        self.gate = GatedWords(questions.width, dim)
        self.layers = nn.Sequential(
            xavier(dim, 2 * dim), nn.ReLU(), xavier(2 * dim, dim), published.dropout(paper), nn.ReLU(), xavier(dim, dim)
        )

    def forward(self, text: Int64[Tensor, "b L"]) -> Float[Tensor, "b dim"]:
        vector, _ = self.gate(self.questions(text))
        return self.layers(vector)
