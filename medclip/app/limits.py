"""How much one may ask of the viewer, and what becomes of more: refused in words, or told to come again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import TypeVar

from medclip.types import UserError

V = TypeVar("V")


class Refused(Exception):
    """A request that is not answered: one line for its sender, and HTTP's number for the reason."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why


@dataclass(frozen=True)
class Limits:
    """What the viewer spends at most.

    Args:
        renders: tiles drawn at a time; 0 for as many as there are cores.
        maps: maps, searches and texts worked on at a time; 0 likewise.
        waiting: requests that may wait for either; beyond, 503.
        prompt: characters of a text.
        gallery: patches of a gallery.
        slides: kept open.
        tile_bytes: of drawn tiles kept in memory.
        feature_bytes: of features kept in memory (float16).
        index_patches: patches of the cohort that a patch is compared with.
        captions: rows taken of a table of captions.
    """

    renders: int = 0
    maps: int = 0
    waiting: int = 256
    prompt: int = 300
    gallery: int = 24
    slides: int = 32
    tile_bytes: int = 256_000_000
    feature_bytes: int = 2_000_000_000
    index_patches: int = 200_000
    captions: int = 5_000

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name in ("renders", "maps") else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"limits.{field.name}={value}: give a whole number, {least} or more")


class Gate:
    """Work in a few threads, with a queue that ends.

    Args:
        workers: at a time.
        waiting: most that may wait.
        name: of the threads.
    """

    def __init__(self, workers: int, waiting: int, name: str) -> None:
        self.most, self.inside = workers + waiting, 0
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix=name)

    async def run(self, work: Callable[[], V]) -> V:
        """The result of `work`, called in a thread.

        Raises:
            Refused: too many are waiting already.
        """
        if self.inside >= self.most:
            raise Refused(503, "too many requests at once: try again in a moment")
        self.inside += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        finally:
            self.inside -= 1

    def close(self) -> None:
        """Let running work end, and drop what waits."""
        self._pool.shutdown(wait=False, cancel_futures=True)
