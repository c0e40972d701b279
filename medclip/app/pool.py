"""Slides that are open: opened when first asked for, closed when others are wanted more."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from slides.entry import Entry
from slides.open import open_slide
from slides.reader import Slide


@dataclass
class _Held:
    slide: Slide
    users: int = 0


class SlidePool:
    """At most so many open slides, each safe to read from several threads. One that is in use is never closed.

    Args:
        entries: by name; nothing else can be opened.
        most: to keep open.
    """

    def __init__(self, entries: Mapping[str, Entry], most: int) -> None:
        self.entries, self.most = entries, most
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._opening: dict[str, threading.Lock] = {name: threading.Lock() for name in entries}
        self._lock = threading.Lock()

    @contextmanager
    def use(self, name: str) -> Iterator[Slide]:
        """The open slide.

        Raises:
            KeyError: there is none of this name.
            SlideError: it cannot be opened.
        """
        entry = self.entries[name]
        with self._opening[name]:  # two that ask at once wait for one opening; other slides do not
            held = self._take(name)
            if held is None:
                slide = open_slide(entry.path, mpp=entry.mpp)
                with self._lock:
                    held = self._held[name] = _Held(slide, 1)
        try:
            yield held.slide
        finally:
            with self._lock:
                held.users -= 1
            self._close_some()

    def _take(self, name: str) -> _Held | None:
        with self._lock:
            held = self._held.get(name)
            if held is not None:
                held.users += 1
                self._held.move_to_end(name)
            return held

    def _close_some(self) -> None:
        with self._lock:
            idle = [name for name, held in self._held.items() if held.users == 0]
            gone = [self._held.pop(name) for name in idle[: max(len(self._held) - self.most, 0)]]
        for held in gone:
            held.slide.close()

    def __len__(self) -> int:
        return len(self._held)

    def close(self) -> None:
        """Close those that nobody reads from."""
        with self._lock:
            gone = [self._held.pop(name) for name, held in list(self._held.items()) if held.users == 0]
        for held in gone:
            held.slide.close()
