"""How far a run is: slides, patches a second, time to go, failures so far. One line on a terminal, else one a while."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Meter:
    """Counts, and says so now and then.

    Args:
        slides: in all.
        every: seconds between lines.
        out: where to.
    """

    def __init__(self, slides: int, *, every: float | None = None, out: TextIO | None = None) -> None:
        self.slides = slides
        self.out = out or sys.stderr
        self.tty = self.out.isatty()
        self.every = every if every is not None else (0.5 if self.tty else 10.0)
        self.started = self.said = time.monotonic()
        self.done = self.failed = self.planned = self.patches = 0

    def patch(self, planned: int, done: int) -> None:
        """More patches were planned or done."""
        self.planned += planned
        self.patches += done
        self.say()

    def slide(self, status: str) -> None:
        """A slide is done."""
        self.done += 1
        self.failed += status == "failed"
        self.say()

    def line(self, running: int = 0) -> str:
        """As it is now."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        rate = self.patches / seconds
        text = f"{self.done} of {self.slides} slides, {self.patches} patches, {rate:.0f}/s"
        begun = self.done + max(running, 1)
        if self.patches > 0 and self.done < self.slides and self.planned:
            # Slides that were not begun yet are taken to be as large as the others.
            total = self.planned * max(self.slides / min(begun, self.slides), 1.0)
            text += f", {_span((total - self.patches) / rate)} to go" if rate else ""
        return text + (f", {self.failed} failed" if self.failed else "")

    def say(self, *, last: bool = False) -> None:
        now = time.monotonic()
        if not last and now - self.said < self.every:
            return
        self.said = now
        if self.tty:
            print(f"\r\x1b[K{self.line()}", end="\n" if last else "", file=self.out, flush=True)
        else:
            print(self.line(), file=self.out, flush=True)


def _span(seconds: float) -> str:
    minutes, rest = divmod(max(int(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
