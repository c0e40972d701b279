"""What can go wrong with a slide, in one line that the user can act on."""

from __future__ import annotations


class SlideError(Exception):
    """A slide, a mask or a request that cannot be used. One line: what is wrong, which file, the remedy."""


def said(error: Exception) -> str:
    """An error on one line: ours as it is, others with their kind, which is half of what they say."""
    words = str(error) if isinstance(error, SlideError) else f"{type(error).__name__}: {error}"
    return " ".join(words.split())


class TileError(SlideError):
    """Pixels that cannot be decoded. The rest of the slide is not touched by it."""
