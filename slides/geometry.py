"""From a request in mpp to what is read: which level, how many of its pixels, at what scale they are decoded."""

from __future__ import annotations

import math
from dataclasses import dataclass

from slides.errors import SlideError
from slides.levels import best_level
from slides.reader import Slide

# Finer pixels than the slide has are made up; a few per cent of that is resampling, more is a mistake.
_MOST_UPSAMPLING = 1.25
_MOST_READ = 16_384  # level pixels a side of one patch: 0.8 GB


@dataclass(frozen=True)
class Geometry:
    """How patches of one slide are read.

    Args:
        size: pixels of a patch, square, as handed out.
        level: that is read.
        read: side of a patch in that level's pixels.
        reduce: tiles are decoded at 1/`reduce` scale (1, 2, 4 or 8); divides `read`, and every origin is a multiple.
        side: side of a patch in level-0 pixels.
        step: from one patch to the next, in level-0 pixels; not rounded, so that a grid does not drift.
        snap: every origin is a multiple of so many level-0 pixels, so that it is a whole pixel of what is decoded.
        mpp: of the patches as they are; `read` is a whole number, so up to half a pixel in `size` off the request.
        target_mpp: as requested; None for the slide's own.
    """

    size: int
    level: int
    read: int
    reduce: int
    side: float
    step: float
    snap: int
    mpp: float
    target_mpp: float | None


def geometry(
    slide: Slide,
    *,
    size: int,
    mpp: float | None = None,
    overlap: int = 0,
    tolerance: float = 0.0,
    upsample: bool = False,
) -> Geometry:
    """What a request needs of a slide.

    The level is the coarsest that is still as fine as the request; it is never the nearest "magnification".

    Args:
        slide: open.
        size: pixels of a patch, square.
        mpp: of the patches; None for the slide's own.
        overlap: pixels that neighbours share.
        tolerance: a level whose mpp is within this share of the request is read without resampling (0.01 takes 0.499
            for 0.5); the patches' `mpp` stays the true one.
        upsample: allow pixels more than a quarter finer than the slide's.

    Raises:
        SlideError: the request makes no sense, or is finer than the slide.
    """
    if size < 1 or not 0 <= overlap < size:
        raise SlideError(f"patches of {size} pixels that share {overlap}: overlap must be 0 to size - 1")
    if not 0 <= tolerance < 0.25:
        raise SlideError(f"tolerance is {tolerance:g}: choose 0 to 0.25")
    if mpp is None:
        return Geometry(size, 0, size, 1, float(size), float(size - overlap), 1, slide.mpp, None)
    if not 0 < mpp < math.inf:
        raise SlideError(f"mpp is {mpp:g}: choose a positive number of µm")
    level = best_level([one.downsample for one in slide.levels], mpp / slide.mpp * (1 + tolerance))
    downsample = slide.levels[level].downsample
    own = slide.mpp * downsample
    scale = mpp / own  # level pixels a pixel
    if scale < 1 / _MOST_UPSAMPLING and not upsample:
        raise SlideError(
            f"{slide.path.name}: its finest pixels are {own:g} µm, {mpp:g} was asked for: "
            f"ask for mpp={own:g} or more, or allow upsample=true"
        )
    if abs(scale - 1) <= tolerance:
        scale = 1.0
    if size * scale > _MOST_READ:
        raise SlideError(
            f"{slide.path.name}: a patch of {size} pixels at mpp {mpp:g} is {size * scale:.0f} pixels of its coarsest "
            f"level ({own:g} µm): ask for a finer mpp or fewer pixels"
        )
    reduce = _reduce(slide, level, size, round(size * scale))
    read = max(reduce, reduce * round(size * scale / reduce))
    # A step of whole level pixels where a patch is: neighbours then touch, with no gap and no shared column.
    step = float(read) if overlap == 0 else (size - overlap) * read / size
    snap = max(1, int(downsample * reduce))  # rounded up, corners could be half a level pixel off and jump to the next
    return Geometry(size, level, read, reduce, read * downsample, step * downsample, snap, own * read / size, mpp)


def _reduce(slide: Slide, level: int, size: int, read: int) -> int:
    """The strongest scaled decoding that leaves at least as many pixels as are wanted."""
    tile = slide.levels[level].tile
    if tile is None or not slide.scalable(level):
        return 1
    for reduce in (8, 4, 2):
        if read >= reduce * size and tile[0] % reduce == 0 and tile[1] % reduce == 0:
            return reduce
    return 1
