"""Try again, with exponential back-off and full jitter: what remote storage needs when hundreds of ranks knock at once.

Jitter (a wait drawn uniformly up to the back-off) spreads the ranks that one outage lined up.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
MAX_WAIT = 120.0
_random = random.Random()  # of its own: a wait must not move the random numbers of a seeded run


class TryAgain(Exception):
    """A passing failure; `wait` is the number of seconds that the server asked for."""

    def __init__(self, why: str, wait: float | None = None) -> None:
        super().__init__(why)
        self.wait = wait


class GiveUp(Exception):
    """A failure that stays; the message says why."""


def retry(attempt: Callable[[], T], *, tries: int, backoff: float) -> T:
    """Call `attempt` until it raises no `TryAgain`.

    Raises:
        GiveUp: raised by `attempt`, or all `tries` are used up.
    """
    for number in range(1, tries + 1):
        try:
            return attempt()
        except TryAgain as failure:
            if number == tries:
                raise GiveUp(f"{failure} (tried {tries} times)") from failure
            wait = failure.wait if failure.wait is not None else _random.uniform(0, backoff * 2**number)
            time.sleep(min(wait, MAX_WAIT))
    raise AssertionError("tries must be at least 1")
