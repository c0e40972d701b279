"""Words look at patches: a few layers of cross-attention over a CLIP's tokens, and one classifier over all answers.

What a reader of today would take for a baseline of MEVF and QCR. Each layer is a decoder's of Vaswani et al. 2017,
arXiv:1706.03762, with the norms first: words attend to words, then to the image, then pass through two layers. The mean
over the question's real words goes to the classifier.
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from medclip.heads.judged import Judged, all_own
from medclip.types import Asked, QuestionEncoder, UserError


class CrossAttention(nn.Module):
    """Objects (b, v, V) and words (b, q, Q) -> logits; the attention is that of the last layer, a glimpse a head.

    Args:
        objects: V.
        questions: what encodes the words.
        answers: number of answers.
        closed: not used: all answers compete.
        dim: width of the layers.
        heads: of each attention.
        layers: how many.
        dropout: in all layers and before the classifier.
    """

    routed = False

    def __init__(
        self,
        objects: int,
        questions: QuestionEncoder,
        answers: int,
        closed: int = 0,
        *,
        dim: int = 512,
        heads: int = 8,
        layers: int = 2,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise UserError(f"model.head.dim={dim} must be a multiple of model.head.heads={heads}")
        self.see = nn.Sequential(nn.LayerNorm(objects), nn.Linear(objects, dim))
        self.read = nn.Sequential(nn.LayerNorm(questions.dim), nn.Linear(questions.dim, dim))
        self.layers = nn.ModuleList(_Layer(dim, heads, dropout) for _ in range(layers))
        self.classifier = nn.Sequential(nn.LayerNorm(dim), nn.Dropout(dropout), nn.Linear(dim, answers))

    def forward(
        self,
        objects: Float[Tensor, "b v V"],
        asked: Asked,
        text: Int64[Tensor, "b L"],
        closed: Bool[Tensor, " b"] | None = None,
    ) -> Judged:
        seen, words = self.see(objects), self.read(asked.states)
        # A question without a word (a padding row) would leave nothing to attend to.
        real = asked.real | ~asked.real.any(1, keepdim=True)
        share = None
        for layer in self.layers:
            words, share = layer(words, seen, real)
        count = real.sum(1, keepdim=True)
        logits = self.classifier((words * real.unsqueeze(2)).sum(1) / count)
        assert share is not None
        weight = real / count  # what each word has in the mean
        return Judged(logits, all_own(logits), (share * weight[:, None, :, None]).transpose(2, 3))


class _Layer(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.within = nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True)
        self.across = nn.MultiheadAttention(dim, heads, batch_first=True)  # its weights are shown, so they sum to 1
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, words: Float[Tensor, "b q d"], seen: Float[Tensor, "b v d"], real: Bool[Tensor, "b q"]
    ) -> tuple[Float[Tensor, "b q d"], Float[Tensor, "b h q v"]]:
        x = self.norms[0](words)
        words = words + self.dropout(self.within(x, x, x, key_padding_mask=~real, need_weights=False)[0])
        found, share = self.across(self.norms[1](words), seen, seen, average_attn_weights=False)
        words = words + self.dropout(found)
        return words + self.dropout(self.mlp(self.norms[2](words))), share
