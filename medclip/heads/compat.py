"""`compat: paper`: the published code's numbers, errors included."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from medclip.types import UserError


def is_paper(compat: str | None, where: str) -> bool:
    """Whether the published code's behaviour is asked for.

    Raises:
        UserError: another value than null or "paper".
    """
    if compat not in (None, "paper"):
        raise UserError(f"{where}.compat is {compat!r}: say paper for the published code's behaviour, or null")
    return compat == "paper"


def dropout(paper: bool) -> nn.Module:
    """Dropout of a half; as published, it was at work in tests too, so that no two of them agreed."""
    return _AlwaysDropout() if paper else nn.Dropout(0.5)


class _AlwaysDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, training=True)
