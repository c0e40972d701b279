"""Progress of slow preparations: a bar on a terminal, a line every half minute elsewhere, nothing for short ones."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track as rich_track

T = TypeVar("T")
_EVERY = 30.0


def track(items: Iterable[T], total: int, label: str) -> Iterator[T]:
    """`items`, with progress on stderr."""
    if sys.stderr.isatty():
        yield from rich_track(items, label, total, console=Console(stderr=True), transient=True)
        return
    said = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() - said > _EVERY:
            said = time.monotonic()
            print(f"{label}: {done} of {total}", file=sys.stderr, flush=True)
