"""Pictures of patches, read from the slides of a cohort when a report wants to show them."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Int, UInt8

from medclip.types import UserError
from slides.cohort import read_cohort
from slides.errors import SlideError
from slides.open import open_slide


class SlidePictures:
    """Patches of slides that are at hand.

    Args:
        slides: folders, patterns or tables of slides, as `medclip extract slides=` takes them.
        pixels: of a picture's side.

    Raises:
        UserError: no slide is found.
    """

    def __init__(self, slides: str | Sequence[str], pixels: int = 112) -> None:
        try:
            entries = read_cohort([slides] if isinstance(slides, str) else list(slides))
        except SlideError as error:
            raise UserError(f"pictures: {error}") from None
        self.entries = {entry.slide: entry for entry in entries}
        self.pixels = pixels

    def __call__(self, slide: str, coords: Int[np.ndarray, "k 2"], side: float) -> list[UInt8[np.ndarray, "h w 3"]]:
        """The patches whose level-0 corners are `coords`; none for a slide that is not there, or cannot be read."""
        entry = self.entries.get(slide)
        if entry is None:
            return []
        try:
            opened = open_slide(entry.path, mpp=entry.mpp or 1.0)  # which resolution it is does not matter here
            fine = [n for n, level in enumerate(opened.levels) if side / level.downsample >= self.pixels]
            number = max(fine, key=lambda n: opened.levels[n].downsample, default=0)
            scale = opened.levels[number].downsample
            width = max(1, round(side / scale))
            corners = np.round(coords / scale).astype(int).tolist()
            read = [opened.read(number, x, y, width, width) for x, y in corners]
        except SlideError:  # a report does not fail for want of a picture
            return []
        size = (self.pixels, self.pixels)
        return [cv2.resize(patch, size, interpolation=cv2.INTER_AREA) for patch in read]
