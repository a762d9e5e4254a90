"""What holds jobs back, as the scheduler publishes it."""

import asyncio
from typing import Any

from core.errors import Unavailable
from deployments.jobs.strain import StrainWatch
from deployments.messages import ModelStates
from tests.unit.deployments.handles import FakeHandle, answering

KINDS = ("download", "conversion")


async def test_light_jobs_wait_at_serious_strain_only(monkeypatch: Any) -> None:
    monkeypatch.setattr("deployments.jobs.strain._POLL_PAUSE_S", 0.0)
    monkeypatch.setattr("deployments.jobs.strain._BACK_OFF_S", 0.0)
    told = [
        (ModelStates(version=1), {}),
        (ModelStates(strain="warm", version=2), {"conversion": "warm"}),
        (
            ModelStates(strain="hot", keeps_cool=True, version=3),
            {"download": "hot", "conversion": "hot"},
        ),
        (ModelStates(version=4), {}),
    ]
    gate: asyncio.Queue[Any] = asyncio.Queue()

    async def answer(_: int) -> ModelStates:
        found = await gate.get()
        if isinstance(found, Exception):
            raise found
        assert isinstance(found, ModelStates)
        return found

    handle: Any = FakeHandle(model_states=answer)
    watch = StrainWatch(handle, {"download"})
    assert watch.limits(KINDS).held == {}
    task = asyncio.create_task(watch.run())
    for states, held in told:
        gate.put_nowait(states)
        # A scheduler that is away, or has just started, changes nothing.
        gate.put_nowait(Unavailable("away"))
        gate.put_nowait(ModelStates())
        while not gate.empty() or watch.states is not states:
            await asyncio.sleep(0.005)
        assert watch.limits(KINDS).held == held
    assert {1, 2, 3} <= {call[0] for call in handle.model_states.calls}
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_strain_watch_goes_on_after_an_answer_of_its_limit(monkeypatch: Any) -> None:
    monkeypatch.setattr("deployments.jobs.strain._POLL_LIMIT_S", 0.05)
    monkeypatch.setattr("deployments.jobs.strain._BACK_OFF_S", 0.0)
    calls = 0
    later = answering(ModelStates(strain="hot", version=1))

    async def hangs_once(version: int) -> ModelStates:
        nonlocal calls
        calls += 1
        if calls == 1:
            await asyncio.sleep(60)
        found = await later(version)
        assert isinstance(found, ModelStates)
        return found

    handle: Any = FakeHandle(model_states=hangs_once)
    watch = StrainWatch(handle, ())
    task = asyncio.create_task(watch.run())
    while not watch.states.strain:
        await asyncio.sleep(0.005)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
