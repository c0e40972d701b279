"""Bytes brought near before they are asked for: each region once, never in the way, and really in use."""

from __future__ import annotations

import threading
import time

from medclip.data.prefetch import Extent, Prefetcher

MB = 1 << 20


def wait(condition) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.002)


def free(prefetcher: Prefetcher) -> int:
    return prefetcher._room._value  # pyright: ignore[reportAttributeAccessIssue]


def test_each_region_once_and_local_samples_not_at_all() -> None:
    fetched: list[Extent] = []
    place = {0: None, 1: ("u", 0, 10), 2: ("u", 20, 10), 3: ("u", 5 * MB, 10), 4: ("v", 0, 10)}
    prefetcher = Prefetcher(place.__getitem__, lambda *extent: fetched.append(extent))
    prefetcher.want([0])
    assert prefetcher._pool is None  # no thread for local files
    prefetcher.want([1, 2, 3])
    prefetcher.want([4, 1, 3])
    wait(lambda: len(fetched) == 3)
    time.sleep(0.02)
    assert sorted(fetched) == [("u", 0, 10), ("u", 5 * MB, 10), ("v", 0, 10)]
    prefetcher.close()


def test_a_slow_network_neither_blocks_nor_piles_up() -> None:
    gate = threading.Event()
    begun: list[int] = []

    def fetch(url: str, offset: int, length: int) -> None:
        begun.append(offset // MB)
        assert gate.wait(60)

    prefetcher = Prefetcher(lambda sample: ("u", sample * MB, 1), fetch, threads=2, pending=10)
    prefetcher.want(range(1000))  # the gate is shut: waiting for a fetch would never come back
    wait(lambda: len(begun) == 2)
    gate.set()
    wait(lambda: free(prefetcher) == 10)
    assert len(begun) == 10
    prefetcher.want(range(1000))  # what found no room may come again
    wait(lambda: len(begun) == 20)
    assert begun.count(0) == 1
    prefetcher.close()


def test_failures_are_the_readers_affair_and_give_their_place_back() -> None:
    tried: list[int] = []

    def fetch(url: str, offset: int, length: int) -> None:
        tried.append(offset)
        raise OSError("no route")

    prefetcher = Prefetcher(lambda sample: ("u", sample * MB, 1), fetch, pending=2)
    for sample in range(20):
        prefetcher.want([sample])
        wait(lambda sample=sample: len(tried) == sample + 1)
        wait(lambda: free(prefetcher) == 2)
    prefetcher.close()


def test_closing_does_not_wait() -> None:
    gate = threading.Event()
    prefetcher = Prefetcher(lambda sample: ("u", sample * MB, 1), lambda *_: gate.wait(60), threads=1)  # type: ignore[arg-type]
    prefetcher.want(range(5))
    start = time.monotonic()
    prefetcher.close()
    assert time.monotonic() - start < 30
    gate.set()
