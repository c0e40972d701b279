"""Questions by a CLIP's text tower: a state a token, before they are pooled and projected."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int64
from open_clip import CLIP
from torch import Tensor, nn

from medclip.models.build import build_clip
from medclip.models.clip import Clip
from medclip.types import Asked


class QuestionClip(nn.Module):
    """Token ids (b, context) -> `Asked` with the text tower's states after its last norm.

    Args:
        clip: its image tower is given up.
        frozen: keep the tower as it is.
    """

    def __init__(self, clip: Clip, *, frozen: bool = True) -> None:
        super().__init__()
        self.tokenizer = clip.tokenizer
        self.frozen = frozen
        self._about = {k: v for k, v in clip.description.items() if k not in ("lora", "locked")}
        net = clip.net
        tower = net if isinstance(net, CLIP) else net.text
        self.argmax = getattr(tower, "text_pool_type", getattr(tower, "pool_type", "")) == "argmax"
        self.padding: int | None = getattr(getattr(tower, "config", None), "pad_token_id", None)
        net.visual = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
        self.net = net
        self.hugging_face = self.padding is not None
        self.width = int(self._embedding().weight.shape[1])
        self.dim = int(self._tower().transformer.config.hidden_size) if self.hugging_face else self.width
        if frozen:
            net.requires_grad_(False)
        else:  # what comes after the states has no gradient, which other ranks would wait for
            parts = (self._tower().transformer, self._embedding(), self._last())
            inside = {id(p) for part in parts for p in part.parameters()}
            inside |= {id(p) for name, p in net.named_parameters() if "positional" in name}
            for p in net.parameters():
                p.requires_grad_(id(p) in inside)
        self.train()

    def _tower(self) -> Any:
        return self.net if isinstance(self.net, CLIP) else self.net.text

    def _embedding(self) -> nn.Embedding:
        tower = self._tower()
        return tower.transformer.get_input_embeddings() if self.hugging_face else tower.token_embedding

    def _last(self) -> nn.Module:
        tower = self._tower()
        return tower.transformer if self.hugging_face else tower.ln_final

    @property
    def description(self) -> dict[str, Any]:
        """Plain data from which `from_description` makes it again, without its weights."""
        return {"part": "models.question_clip.QuestionClip", "clip": self._about, "frozen": self.frozen}

    @classmethod
    def from_description(cls, fields: Mapping[str, Any]) -> QuestionClip:
        return cls(build_clip(fields["clip"]), frozen=fields["frozen"])

    def another(self) -> QuestionClip:
        return deepcopy(self)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.frozen:
            self.net.eval()
        return self

    def real(self, text: Int64[Tensor, "b q"]) -> Bool[Tensor, "b q"]:
        if self.padding is not None:
            return text != self.padding
        if self.argmax:  # CLIP's end token has the largest id
            return torch.arange(text.shape[1], device=text.device) <= text.argmax(1, keepdim=True)
        return torch.ones_like(text, dtype=torch.bool)

    def forward(self, text: Int64[Tensor, "b q"]) -> Asked:
        found: list[Float[Tensor, "b q dim"]] = []

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            found.append(getattr(output, "last_hidden_state", output))

        handle = self._last().register_forward_hook(keep)
        try:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
                self.net.encode_text(text)
        finally:
            handle.remove()
        return Asked(found[0], self.real(text), self._embedding()(text))
