"""Background work that is held up: a real process stops and goes on."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator

import psutil
import pytest

from catalog.convert.pause import PauseSwitch


@pytest.fixture
async def process() -> AsyncIterator[asyncio.subprocess.Process]:
    """A process group of its own that lives until it is killed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "import sys; sys.stdin.read()",
        stdin=asyncio.subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    yield process
    if process.returncode is None:
        process.kill()
    await process.wait()


async def reaches(process: asyncio.subprocess.Process, *, is_stopped: bool) -> None:
    async with asyncio.timeout(10):
        while (psutil.Process(process.pid).status() == psutil.STATUS_STOPPED) != is_stopped:
            await asyncio.sleep(0.005)


async def test_f15_a_covered_process_stops_and_goes_on(
    process: asyncio.subprocess.Process,
) -> None:
    switch = PauseSwitch()
    with switch.controlling(process.pid):
        switch.switch(is_on=True)
        await reaches(process, is_stopped=True)
        switch.switch(is_on=False)
        await reaches(process, is_stopped=False)


async def test_f15_what_begins_while_it_is_on_is_stopped_and_can_still_be_killed(
    process: asyncio.subprocess.Process,
) -> None:
    switch = PauseSwitch()
    switch.switch(is_on=True)
    with switch.controlling(process.pid):
        await reaches(process, is_stopped=True)
        process.kill()
        assert await process.wait() == -signal.SIGKILL


async def test_a_process_that_ended_or_is_no_longer_covered_is_left_alone(
    process: asyncio.subprocess.Process,
) -> None:
    switch = PauseSwitch()
    with switch.controlling(process.pid):
        pass
    switch.switch(is_on=True)
    await reaches(process, is_stopped=False)
    process.kill()
    await process.wait()
    with switch.controlling(process.pid):
        switch.switch(is_on=False)


async def test_nothing_passes_while_it_is_on() -> None:
    switch = PauseSwitch()
    await switch.wait_until_off()
    switch.switch(is_on=True)
    waiting = asyncio.ensure_future(switch.wait_until_off())
    await asyncio.sleep(0)
    assert not waiting.done()
    switch.switch(is_on=False)
    await waiting
