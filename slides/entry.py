"""A slide of a cohort by name, and the names that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slides.errors import SlideError


@dataclass(frozen=True)
class Entry:
    """One line of a cohort.

    Args:
        slide: its name in all outputs; unique.
        path: of the file.
        mpp: of level 0, where the user says so.
        extra: what else the user's table says (patient, label…), which goes with each patch.
    """

    slide: str
    path: str
    mpp: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.slide.strip() or self.slide.startswith(".") or any(c in self.slide for c in "/\\\0\n"):
            raise SlideError(f"{self.path}: {self.slide!r} is no name for a slide: give one in the column slide")
        try:
            (self.slide + self.path).encode()
        except UnicodeEncodeError:  # a name in the bytes of another encoding
            raise SlideError(f"{self.path!a}: its name is not UTF-8: rename it (convmv does many)") from None
        if len(self.slide.encode()) > 180:
            raise SlideError(f"{self.path}: its name is over 180 bytes: give a shorter one in the column slide")


def plain(slide: str) -> str:
    """The name in a tar: webdataset ends a key at the first dot."""
    return slide.replace(".", "-")


def member_name(slide: str, x: int, y: int) -> str:
    """The key of a patch: the slide and its level-0 corner."""
    return f"{plain(slide)}_{x}_{y}"
