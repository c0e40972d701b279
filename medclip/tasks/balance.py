"""Loss terms that weigh classes by how frequent they are ask for it by `balanced`, and are told here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn


def balance(terms: Iterable[nn.Module], classes: Sequence[str], data: Any) -> None:
    """Tell the terms that ask for it how many samples of the data have each class, and how many do not."""
    asking: list[Any] = [term for term in terms if getattr(term, "balanced", False)]
    count = getattr(data, "label_counts", None)
    if asking and count is not None:
        counts = count()
        positives, negatives = zip(*(counts.get(name, (0, 0)) for name in classes), strict=True)
        for term in asking:
            term.balance(positives, negatives)
