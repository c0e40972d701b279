"""What was made lately, up to so many bytes; whoever asks for a thing that is being made waits for it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Lru(Generic[K, V]):
    """A mapping that forgets what was used least recently. Safe to use from several threads.

    Args:
        limit: bytes to keep. One value that is larger is handed over, and not kept.
        size: bytes of a value.
    """

    def __init__(self, limit: int, size: Callable[[V], int]) -> None:
        self.limit, self.used = limit, 0
        self._size = size
        self._kept: OrderedDict[K, V] = OrderedDict()
        self._making: dict[K, Future[V]] = {}
        self._lock = threading.Lock()

    def peek(self, key: K) -> V | None:
        """The value where it is there."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value, made now where it is not there; an error is that of `make`, and is not kept."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            other = self._making.get(key)
            mine = self._making.setdefault(key, Future())
        if other is not None:
            return other.result()
        try:
            value = make()
        except BaseException as error:
            with self._lock:
                del self._making[key]
            mine.set_exception(error)
            raise
        with self._lock:
            del self._making[key]
            self._keep(key, value)
        mine.set_result(value)
        return value

    def _keep(self, key: K, value: V) -> None:
        size = self._size(value)
        if size > self.limit:
            return
        self._kept[key] = value
        self.used += size
        while self.used > self.limit:
            _, old = self._kept.popitem(last=False)
            self.used -= self._size(old)
