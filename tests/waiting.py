"""Waiting for a condition on an event loop."""

import asyncio
from collections.abc import Callable


async def wait_until(condition: Callable[[], object], what: str, limit_s: float = 30.0) -> None:
    """Return once `condition` is true; fails with `what` after `limit_s`."""
    loop = asyncio.get_running_loop()
    end = loop.time() + limit_s
    while not condition():
        assert loop.time() < end, f"timed out: {what}"
        await asyncio.sleep(0.002)
