"""What an evaluation's config says of the set itself: where it lies, how to get it, and what of it is certain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medclip.types import UserError

SOURCES = ("", "confirmed", "unconfirmed")


@dataclass(frozen=True)
class Card:
    """The keys of `evals.NAME` that are about its set, not for the evaluation.

    Args:
        domain: pathology, radiology…; what averages are taken by.
        source: "confirmed" where labels, class names, split and layout were read in the set's own documents or in the
            code of a public evaluation, "unconfirmed" where one of them is from memory or a guess; "": nobody said.
        core: no training set that this house has a reader for is known to hold these images.
        root: folder of the set; None for an evaluation without one of its own.
        needs: files or folders that must be there, patterns relative to `root`.
        file: name of its file, where there are several to choose from; for `needs` and the sources to refer to.
        get: how to get the set: page, and what to put where.
    """

    domain: str = ""
    source: str = ""
    core: bool = False
    root: str | None = None
    needs: tuple[str, ...] = ()
    file: str = ""
    get: str = ""

    @classmethod
    def parse(cls, name: str, config: Mapping[str, Any]) -> Card:
        """From the keys of `evals.NAME` that are a card's; others are passed over.

        Raises:
            UserError: a value of another kind.
        """
        own = {key: config[key] for key in KEYS if config.get(key) is not None}
        if (source := own.get("source", "")) not in SOURCES:
            raise UserError(f"evals.{name}.source={source}: choose confirmed or unconfirmed")
        if not isinstance(core := own.get("core", False), bool):
            raise UserError(f"evals.{name}.core={core}: choose true or false")
        needs = own.pop("needs", ())
        return cls(**own, needs=(needs,) if isinstance(needs, str) else tuple(map(str, needs)))

    def missing(self) -> list[str]:
        """Those of `needs` that are not there."""
        if self.root is None:
            return []
        root = Path(self.root).expanduser()
        return [need for need in self.needs if next(root.glob(need), None) is None]


KEYS = tuple(Card.__dataclass_fields__)
