"""Answers in words: what is seen of an image stands before the question in a causal language model, which goes on.

Liu et al. 2023, arXiv:2304.08485 (LLaVA), with the two layers of arXiv:2310.03744 between image and language:

    [start] W2 gelu(W1 v_1), W2 gelu(W1 v_2), …, question: how many kidneys are there answer:  ->  two [end]

The answer is the most probable token, one after another, up to the end token. Trained are the two layers and, as one
chooses, the language model, adapters in it, or nothing of it; and what sees the image, unless it is frozen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from medclip.models.language import IGNORED, Language, load_language
from medclip.models.parts import rebuild
from medclip.types import CLOSED, OPEN, Batch, Preprocess, UserError


class Spoken(NamedTuple):
    """Logits of each next token of the right answer, and that token; -100 where there is none."""

    logits: Float[Tensor, "b t vocabulary"]
    target: Int64[Tensor, "b t"]


class Told(NamedTuple):
    """What evaluations get.

    `texts` are the answers. `scores` are log-odds of an answer's probability at its place among the known ones, and
    -inf elsewhere; all -inf for one that is not known. `closed` is NaN: types are not told. `attention` is that of the
    last layer's heads from the prompt's last token to the objects, with a sum of 1.
    """

    scores: Float[Tensor, "b answers"]
    closed: Float[Tensor, " b"]
    attention: Float[Tensor, "b heads objects 1"]
    texts: list[str]
    probability: Float[Tensor, " b"]


class Speaker(nn.Module):
    """`Batch` -> `Spoken`.

    Args:
        visual: `Batch -> objects (b, v, dim)`.
        language: goes on from them and the question.
        answers: of training, all that `batch["label"]` can say; the model may say others.
        prompt: text with one {} for the question.
        length: tokens of a prompt.
        answer_length: tokens of an answer, its end included.

    Raises:
        UserError: answers of two kinds, or a prompt that does not fit.
    """

    def __init__(
        self,
        visual: nn.Module,
        language: Language,
        answers: Sequence[str],
        *,
        prompt: str = "question: {} answer:",
        length: int = 48,
        answer_length: int = 16,
    ) -> None:
        super().__init__()
        self.answers = list(map(str, answers))
        if any(name.startswith((CLOSED, OPEN)) for name in self.answers):
            raise UserError("a model that generates has one list of answers: say data.labels.field=vqa.answer")
        if answer_length < 2:
            raise UserError(f"model.answer_length is {answer_length}: give 2 or more, the end token included")
        self.visual: Any = visual
        self.language = language
        self.options = {"prompt": prompt, "length": length, "answer_length": answer_length}
        self.tokenizer = language.tokens(prompt, length)
        self.preprocess: Preprocess = self.visual.preprocess or Preprocess()
        dim = self.visual.dim
        self.project = nn.Sequential(nn.Linear(dim, language.dim), nn.GELU(), nn.Linear(language.dim, language.dim))
        self.register_buffer("_answers", self.tokenizer.answers(self.answers, answer_length), persistent=False)
        self._answers: Tensor
        self._places = {name: i for i, name in enumerate(self.answers)}

    @property
    def device(self) -> torch.device:
        return self._answers.device

    @property
    def description(self) -> dict[str, Any]:
        """Plain data from which `speaker_from` makes this model again, without its weights."""
        return {
            "kind": "vqa_text",
            "answers": self.answers,
            "visual": self.visual.description,
            "files": self.language.files,
            "language": {"lora": self.language.lora, "frozen": self.language.frozen},
            "options": self.options,
            "preprocess_cfg": self.preprocess.as_dict(),
        }

    def forward(self, batch: Batch) -> Spoken:
        """Of rows whose right answer is not known all targets are -100."""
        label = batch.get("label")
        if label is None:
            raise UserError("the data have no answers: say data.labels (names, field: vqa.answer; conf/data/vqa.yaml)")
        known = (label == 1).any(1, keepdim=True)
        target = self._answers[label.argmax(1)].masked_fill(~known, IGNORED)
        prefix, real, _ = self._prefix(batch)
        fed = target[:, :-1]
        inputs = torch.cat([prefix, self.language.embed(fed.clamp(min=0))], 1)
        mask = torch.cat([real, fed != IGNORED], 1)
        out = self._net(inputs, mask, use_cache=False, logits_to_keep=target.shape[1])
        return Spoken(out.logits, target)

    @torch.no_grad()
    def answer(self, batch: Batch) -> Told:
        """Answers by the most probable token each."""
        inputs, mask, objects = self._prefix(batch)
        out = self._net(inputs, mask, use_cache=True, logits_to_keep=1, output_attentions=True)
        seen = out.attentions[-1][:, :, -1, objects].float()
        told = torch.zeros(len(inputs), device=inputs.device)
        done = torch.zeros(len(inputs), dtype=torch.bool, device=inputs.device)
        said: list[Tensor] = []
        while True:
            best, token = out.logits[:, -1].float().log_softmax(-1).max(-1)
            told += best.masked_fill(done, 0.0)
            said.append(token.masked_fill(done, self.tokenizer.end))
            done = done | (token == self.tokenizer.end)
            if bool(done.all()) or len(said) == self.options["answer_length"]:
                break
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            step = self.language.embed(said[-1]).unsqueeze(1)
            out = self._net(step, mask, use_cache=True, past_key_values=out.past_key_values)
        texts = [self._text(row) for row in torch.stack(said, 1).tolist()]
        scores = told.new_full((len(texts), len(self.answers)), -math.inf)
        for row, text in enumerate(texts):
            if text in self._places:
                scores[row, self._places[text]] = torch.logit(told[row].exp(), eps=1e-6)
        attention = (seen / seen.sum(-1, keepdim=True).clamp(min=1e-12)).unsqueeze(-1)
        return Told(scores, torch.full_like(told, math.nan), attention, texts, told.exp())

    def _text(self, ids: list[int]) -> str:
        end = ids.index(self.tokenizer.end) if self.tokenizer.end in ids else len(ids)
        return self.tokenizer.decode(ids[:end]).lower()

    def _prefix(self, batch: Batch) -> tuple[Float[Tensor, "b t dim"], Bool[Tensor, "b t"], slice]:
        """What comes before the answer, where it is real, and where the objects stand."""
        text = batch.get("text")
        if text is None:
            raise UserError(
                "the data hand out no questions: say which fields hold them (data.sources.0.questions, see conf/data/"
                "vqa.yaml)"
            )
        seen = self.visual(batch)
        objects = self.project(seen[0] if isinstance(seen, tuple) else seen)
        parts = [objects, self.language.embed(text)]
        if self.tokenizer.start is not None:
            parts.insert(0, self.language.embed(torch.full_like(text[:, :1], self.tokenizer.start)))
        first = len(parts) - 2
        before = torch.ones(len(text), first + objects.shape[1], dtype=torch.bool, device=text.device)
        real = (text != self.tokenizer.padding).cumsum(1) > 0  # padding is at the front
        place = slice(first, first + objects.shape[1])
        return torch.cat(parts, 1), torch.cat([before, real], 1), place

    def _net(self, inputs: Float[Tensor, "b t dim"], mask: Bool[Tensor, "b all"], **options: Any) -> Any:
        places = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -inputs.shape[1] :]
        return self.language.net(
            inputs_embeds=inputs, attention_mask=mask.long(), position_ids=places, return_dict=True, **options
        )


def build_generate(
    answers: Sequence[str] | None, visual: nn.Module, language: Mapping[str, Any], **options: Any
) -> Speaker:
    """A model to be trained.

    Args:
        answers: of the training questions.
        visual: see `Speaker`.
        language: `{folder, lora, frozen}` of `load_language`.
        **options: of `Speaker`.

    Raises:
        UserError: no answers, or see `load_language`.
    """
    if not answers:
        raise UserError("the model has no answers: say data.labels (names, field: vqa.answer; see conf/data/vqa.yaml)")
    return Speaker(visual, load_language(**language), answers, **options)


def speaker_from(description: Mapping[str, Any]) -> Speaker:
    """The described model (`Speaker.description`) with random weights."""
    language = Language.from_files(description["files"], **description["language"])
    return Speaker(rebuild(description["visual"]), language, description["answers"], **description["options"])
