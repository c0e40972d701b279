"""What all that sees an image for a VQA model shares (see `visual`): freezing, remembered features, a description."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from medclip.models.parts import name_of
from medclip.models.remembered import Remembered
from medclip.types import Batch, Preprocess, UserError

Seen = tuple[Float[Tensor, "b v dim"], Float[Tensor, " b"]]


class Eye(nn.Module):
    """`Batch -> objects (b, v, dim)`; what it sees by, and what its description tells beyond this, is its heirs'.

    Args:
        frozen: it stays as it is, and its features are remembered.
        remember: GB of memory for these; 0 for none.
    """

    dim: int
    preprocess: Preprocess | None = None  # of its images; None where any will do

    def __init__(self, *, frozen: bool, remember: float) -> None:
        super().__init__()
        if not 0 <= remember < 1e6:
            raise UserError(f"model.visual.remember is {remember}: give GB of memory, 0 for none")
        self.frozen = frozen
        self.remember = remember
        self.memory = Remembered(int(remember * 1e9)) if frozen and remember else None
        self.register_load_state_dict_pre_hook(lambda *_: self._forget())

    @property
    def description(self) -> dict[str, Any]:
        """Plain data from which `from_description` makes it again, without its weights."""
        return {"part": name_of(type(self)), "frozen": self.frozen, "remember": self.remember}

    @classmethod
    def from_description(cls, fields: Mapping[str, Any]) -> Self:
        return cls(**fields)

    def see(self, batch: Batch) -> Float[Tensor, "b v dim"]:
        raise NotImplementedError

    def _settle(self) -> None:
        """To be called when all parts are there."""
        if self.frozen:
            self.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and not self.frozen)

    def _apply(self, *args: Any, **options: Any) -> Self:
        self._forget()  # another device or type
        return super()._apply(*args, **options)

    def _forget(self) -> None:
        if self.memory is not None:
            self.memory.forget()

    def forward(self, batch: Batch) -> Float[Tensor, "b v dim"] | Seen:
        return self.seen(batch)

    def seen(self, batch: Batch) -> Float[Tensor, "b v dim"]:
        """`see`, or what is remembered of it."""
        of: Any = {key: value for key, value in batch.items() if key in ("image", "mean", "std")}
        if self.memory is None or isinstance(of["image"], FakeTensor):  # a dry run's, without content
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
                return self.see(batch)
        # One row at a time and in evaluation mode, see `remembered`.
        make = lambda row: self.see({key: value[row : row + 1] for key, value in of.items()})  # noqa: E731 # pyright: ignore
        return self.memory(list(of.values()), make)
