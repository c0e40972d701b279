"""Remote bytes brought into the node's disk cache before the workers ask for them.

The order is known, so what the next batches will read is known too: a few threads fetch it while the towers compute.
Local sources need none of this, and no thread is started for them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

Extent = tuple[str, int, int]  # url, offset, length

_GRAIN = 1 << 20  # extents of one megabyte of a shard are asked for once


class Prefetcher:
    """Fetches the extents of wanted samples in the background, each region of a shard once while it is recent.

    Args:
        extent: where a sample's bytes lie, or None for local ones.
        fetch: `Storage.prefetch`; failures are left to the reader.
        threads: reads under way at once.
        pending: wanted regions beyond this many are not queued, so that a slow network cannot pile up memory.
    """

    def __init__(
        self,
        extent: Callable[[int], Extent | None],
        fetch: Callable[[str, int, int], None],
        *,
        threads: int = 4,
        pending: int = 256,
    ) -> None:
        self.extent = extent
        self.fetch = fetch
        self.threads = threads
        self._recent: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._room = threading.BoundedSemaphore(pending)
        self._pool: ThreadPoolExecutor | None = None

    def want(self, samples: Iterable[int]) -> None:
        """Queue what these samples will read; returns at once."""
        for sample in samples:
            where = self.extent(int(sample))
            if where is None:
                continue
            url, offset, length = where
            region = (url, offset // _GRAIN)
            if region in self._recent:
                continue
            if not self._room.acquire(blocking=False):
                return
            self._recent[region] = None
            if len(self._recent) > 4096:
                self._recent.popitem(last=False)
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="prefetch")
            self._pool.submit(self._one, url, offset, length)

    def _one(self, url: str, offset: int, length: int) -> None:
        try:
            self.fetch(url, offset, length)
        finally:
            self._room.release()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
