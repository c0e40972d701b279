from __future__ import annotations

import asyncio
import threading

import pytest

from medclip.app.limits import Gate, Limits, Refused
from medclip.types import UserError


def test_beyond_the_queue_is_refused_and_later_is_not() -> None:
    async def go() -> None:
        gate, free = Gate(1, 2, "test"), threading.Event()
        inside = [asyncio.create_task(gate.run(free.wait)) for _ in range(3)]
        await asyncio.sleep(0)  # they enter
        with pytest.raises(Refused) as refused:
            await gate.run(lambda: None)
        assert refused.value.status == 503
        free.set()
        assert await asyncio.gather(*inside) == [True] * 3
        assert await gate.run(lambda: "again") == "again"
        gate.close()

    asyncio.run(go())


@pytest.mark.parametrize(("key", "value"), [("waiting", 0), ("prompt", -1), ("slides", 1.5), ("tile_bytes", True)])
def test_limits_that_are_none(key: str, value: object) -> None:
    with pytest.raises(UserError, match=f"limits.{key}"):
        Limits(**{key: value})  # type: ignore[arg-type]
