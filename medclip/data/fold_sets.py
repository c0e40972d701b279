"""The test parts of all folds as one set: each slide once, with the number of the fold whose model may judge it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from medclip.data.bags import BagSet
from medclip.data.ledger import Bad
from medclip.types import Batch, UserError


class FoldSets:
    """`BagSet` of each fold, one after the other.

    Args:
        bags: makes the set of a fold: `BagSet` but for `folds` and `fold`.
        folds: how many there are.

    Raises:
        UserError: fewer than two folds; see `BagSet`.
    """

    def __init__(self, bags: Callable[..., BagSet], folds: int) -> None:
        if isinstance(folds, bool) or not isinstance(folds, int) or folds < 2:
            raise UserError(f"data.folds is {folds!r}: give the number of folds that the models were trained on")
        self.folds = folds
        self.sets = [bags(folds=folds, fold=fold) for fold in range(folds)]
        self.bad: list[Bad] = []

    @property
    def classes(self) -> tuple[str, ...]:
        return self.sets[0].classes

    @property
    def target(self) -> str:
        return self.sets[0].target

    @property
    def dim(self) -> int:
        return self.sets[0].dim

    @property
    def encoder(self) -> str | None:
        return self.sets[0].encoder

    def __len__(self) -> int:
        """Bags of all folds."""
        return sum(len(own) for own in self.sets)

    def batches(self, batch_size: int = 1, workers: int = 0) -> Iterator[Batch]:
        """All bags, as `BagSet.batches` gives them; each one's `meta` also says its `fold`. `self.bad` lists what was
        left out once the iteration is over, each once.

        Raises:
            UserError: no bag of a fold could be read.
        """
        bad: dict[Bad, None] = {}
        self.bad = []
        for fold, own in enumerate(self.sets):
            for batch in own.batches(batch_size, workers):
                meta: list[dict[str, Any]] = batch.get("meta", [])
                for about in meta:
                    about["fold"] = fold
                yield batch
            bad |= dict.fromkeys(own.bad)  # what the table cannot use is of every fold
        self.bad = list(bad)
