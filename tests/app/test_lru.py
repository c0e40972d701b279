from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from medclip.app.lru import Lru


def test_what_was_used_least_recently_goes_first() -> None:
    kept: Lru[str, bytes] = Lru(10, len)
    for key in "abc":
        kept.get(key, lambda: b"1234")  # 12 bytes: a is forgotten
    assert kept.peek("a") is None and kept.peek("b") == b"1234" and kept.used == 8
    kept.get("d", lambda: b"1234")  # b was looked at after c
    assert kept.peek("c") is None and kept.peek("b") is not None


def test_what_is_too_large_is_handed_over_and_not_kept() -> None:
    kept: Lru[str, bytes] = Lru(3, len)
    assert kept.get("a", lambda: b"1234") == b"1234"
    assert kept.peek("a") is None and kept.used == 0


def test_many_that_ask_at_once_make_it_once() -> None:
    kept: Lru[str, bytes] = Lru(10, len)
    begun, go, made = threading.Event(), threading.Event(), []

    def make() -> bytes:
        made.append(1)
        begun.set()
        go.wait(10)
        return b"x"

    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(kept.get, "a", make)
        begun.wait(10)
        others = [pool.submit(kept.get, "a", make) for _ in range(3)]
        go.set()
        assert [one.result(10) for one in (first, *others)] == [b"x"] * 4
    assert len(made) == 1


def test_an_error_is_everybody_s_and_is_not_kept() -> None:
    kept: Lru[str, bytes] = Lru(10, len)

    def fail() -> bytes:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        kept.get("a", fail)
    assert kept.get("a", lambda: b"x") == b"x"
