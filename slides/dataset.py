"""Patches of slides by number, for torch's DataLoader or whoever else asks for batches.

    patches = SlidePatches.of(["a.svs", "b.svs"], Request(size=224, mpp=0.5))
    for batch in DataLoader(patches, batch_size=64, shuffle=True, num_workers=4): ...

A batch is asked for as a whole (`__getitems__`), so patches of one slide that lie next to each other share the tiles
that they need: each is decoded once. Slides are opened by the process that reads them.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from slides.cohort import name_of
from slides.colours import Change, recolour
from slides.entry import Entry
from slides.errors import SlideError, TileError
from slides.open import open_slide
from slides.patches import CORRUPT, STATUS, read_patches
from slides.plan import Plan, make_plan
from slides.reader import Slide
from slides.request import Request


@dataclass
class _Held:
    slide: Slide
    users: int = 0


@dataclass
class _Opened:
    """What one process has open."""

    process: int = field(default_factory=os.getpid)
    lock: threading.Lock = field(default_factory=threading.Lock)
    slides: OrderedDict[int, _Held] = field(default_factory=OrderedDict)
    changes: dict[int, Change | None] = field(default_factory=dict)  # small, but a stain takes a while to estimate


class Handles:
    """Slides that are opened when they are first read; beyond `limit` the least recently used are closed.

    Copies in other processes, forked or pickled, open their own. Safe to use from several threads.

    Args:
        slides: by number, each with the plan of its patches.
        request: whether reading is exact, and what is done to colours.
        limit: slides open at a time, those in use not counted.
    """

    def __init__(self, slides: Sequence[tuple[Entry, Plan]], request: Request, limit: int = 8) -> None:
        if limit < 1:
            raise SlideError(f"handles is {limit}: choose at least 1")
        self.slides, self.request, self.limit = tuple(slides), request, limit
        self._opened = _Opened()
        self._inherited: _Opened | None = None

    def __getstate__(self) -> tuple[tuple[tuple[Entry, Plan], ...], Request, int]:
        return self.slides, self.request, self.limit

    def __setstate__(self, state: tuple[tuple[tuple[Entry, Plan], ...], Request, int]) -> None:
        self.__init__(*state)

    @contextmanager
    def lent(self, number: int) -> Iterator[tuple[Slide, Change | None]]:
        """Slide `number`, open, and what changes the colours of its patches.

        Raises:
            SlideError: it cannot be opened.
        """
        if self._opened.process != os.getpid():
            # A forked copy shares its parent's files and locks: these are left alone, not closed.
            self._inherited, self._opened = self._opened, _Opened()
        mine = self._opened
        with mine.lock:
            held = mine.slides.get(number) or self._open(mine, number)
            held.users += 1
            mine.slides.move_to_end(number)
        try:
            yield held.slide, mine.changes[number]
        finally:
            with mine.lock:
                held.users -= 1
                self._close_some(mine)

    def _open(self, mine: _Opened, number: int) -> _Held:
        entry, plan = self.slides[number]
        slide = open_slide(entry.path, mpp=entry.mpp, exact=self.request.exact)
        if number not in mine.changes:
            try:
                mine.changes[number] = recolour(slide, self.request, plan)
            except BaseException:
                slide.close()
                raise
        return mine.slides.setdefault(number, _Held(slide))

    def _close_some(self, mine: _Opened) -> None:
        idle = [number for number, held in mine.slides.items() if not held.users]
        for number in idle[: max(len(mine.slides) - self.limit, 0)]:
            mine.slides.pop(number).slide.close()

    def close(self) -> None:
        """Close what this process has open and does not read from."""
        with self._opened.lock:
            for number in [number for number, held in self._opened.slides.items() if not held.users]:
                self._opened.slides.pop(number).slide.close()


class SlidePatches:
    """A map-style data set of the patches of some slides, slide after slide, each in its plan's order.

    An item is `{"image": uint8 (size, size, 3), "slide": name, "x": int, "y": int, "status": str, "row": int}`: x and
    y are level-0 pixels of the upper left corner, row is the patch's number in its slide's plan, status one of
    `patches.STATUS`. Picklable, and safe under fork and spawn.

    Args:
        slides: each with the plan of its patches; all of one size.
        request: of the plans; says whether reading is exact, and what is done to colours.
        corrupt: `mark` gives a patch that cannot be decoded the status "corrupt" and white pixels, which nobody should
            train on: look at the status; `raise` raises.
        handles: slides open at a time in each process.
        threads: that decode.

    Raises:
        SlideError: an unknown option, or plans of several patch sizes.
    """

    def __init__(
        self,
        slides: Iterable[tuple[Entry, Plan]],
        request: Request | None = None,
        *,
        corrupt: Literal["mark", "raise"] = "mark",
        handles: int = 8,
        threads: int = 1,
    ) -> None:
        pairs = list(slides)
        if corrupt not in ("mark", "raise"):
            raise SlideError(f"corrupt is {corrupt!r}: choose mark or raise")
        if len(sizes := {plan.geometry.size for _, plan in pairs}) > 1:
            raise SlideError(f"plans of {' and '.join(map(str, sorted(sizes)))} pixels: a batch needs one size")
        self.plans = [plan for _, plan in pairs]
        self.starts = np.cumsum([0, *(len(plan) for plan in self.plans)])
        self.corrupt, self.threads = corrupt, threads
        self.handles = Handles(pairs, request or Request(), handles)

    @classmethod
    def of(cls, slides: Iterable[Entry | str | Path], request: Request, **options: Any) -> SlidePatches:
        """The tissue patches of slides, planned now.

        Args:
            slides: paths, or entries of a cohort.
            request: which patches.
            **options: of the class.

        Raises:
            SlideError: a slide that cannot be read, or that the request does not fit.
        """
        pairs = []
        for one in slides:
            entry = one if isinstance(one, Entry) else Entry(name_of(Path(one)), str(one))
            with open_slide(entry.path, mpp=entry.mpp, exact=request.exact) as slide:
                pairs.append((entry, make_plan(slide, entry.slide, request)[0]))
        return cls(pairs, request, **options)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Patch `index`.

        Raises:
            IndexError: there is none.
            SlideError: the slide cannot be opened any more.
            TileError: it cannot be decoded, and `corrupt` is `raise`.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Several patches in the order asked for. Raises: as `__getitem__`."""
        numbers = np.asarray(indices, np.int64)
        numbers = np.where(numbers < 0, numbers + len(self), numbers)
        if ((numbers < 0) | (numbers >= len(self))).any():
            raise IndexError(f"patch {list(indices)} of {len(self)}")
        items: list[dict[str, Any]] = [{} for _ in numbers]
        slides = np.searchsorted(self.starts, numbers, side="right") - 1
        for slide in np.unique(slides).tolist():
            places = np.flatnonzero(slides == slide)
            # A plan is in reading order: ascending rows are neighbours.
            places = places[np.argsort(numbers[places], kind="stable")]
            rows = numbers[places] - self.starts[slide]
            for place, item in zip(places.tolist(), self._read(slide, rows), strict=True):
                items[place] = item
        return items

    def _read(self, number: int, rows: np.ndarray) -> Iterator[dict[str, Any]]:
        plan, exact = self.plans[number], self.handles.request.exact
        coords = plan.coords[rows]
        with self.handles.lent(number) as (slide, change):

            def then(pixels: np.ndarray, status: np.ndarray) -> np.ndarray:
                pixels = pixels if change is None else change(pixels)
                pixels[status == CORRUPT] = 255
                return pixels

            for chunk in read_patches(slide, plan.geometry, coords, then, exact=exact, threads=self.threads):
                if self.corrupt == "raise" and chunk.broken:
                    raise TileError(chunk.broken[0])
                for k, (status, image) in enumerate(zip(chunk.status.tolist(), chunk.value, strict=True), chunk.first):
                    x, y = coords[k].tolist()
                    row = int(rows[k])
                    yield {
                        "image": image, "slide": plan.slide, "x": x, "y": y, "status": STATUS[status], "row": row
                    }  # fmt: skip
