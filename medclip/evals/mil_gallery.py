"""Slides for the report: the surest right and wrong ones, or those of the highest and lowest risk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from medclip.evals.mil_details import SlideExample

EACH = 6  # slides under a title


@dataclass(frozen=True)
class _Kept:
    score: float
    example: SlideExample


class SlideGallery:
    """Keeps the slides that score highest while a set is passed over; only these are drawn.

    Args:
        most: slides under a title.
    """

    def __init__(self, most: int = EACH) -> None:
        self.most = most
        self._kept: dict[str, dict[str, list[_Kept]]] = {}  # title -> part -> the best, in their order

    def see(self, title: str, part: str, score: float, draw: Callable[[], SlideExample]) -> None:
        """Take a slide if it is among the best of its part of a title; among equals the earlier one stays."""
        own = self._kept.setdefault(title, {}).setdefault(part, [])
        if len(own) < self.most or score > own[-1].score:
            own.append(_Kept(score, draw()))
            own.sort(key=lambda one: -one.score)
            del own[self.most :]

    def shown(self) -> dict[str, list[SlideExample]]:
        """Title -> slides, the parts in turn, so that no easy class fills the row."""
        found = {}
        for title, parts in self._kept.items():
            ordered = [(turn, -one.score, one) for own in parts.values() for turn, one in enumerate(own)]
            ordered.sort(key=lambda entry: entry[:2])
            found[title] = [one.example for *_, one in ordered[: self.most]]
        return found
