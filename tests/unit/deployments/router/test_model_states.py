"""The router's residency: published states, answers of loads and denials, in any order."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from core.errors import CrashingRequest, Unavailable
from core.types import Embeddings
from deployments.activity import DeathRecords
from deployments.messages import ModelStates, Residency
from deployments.router import model_states as model_states_module
from deployments.router.dispatch import HandleDispatcher
from deployments.router.model_states import ModelStatesWatch
from deployments.serve.handles import ReplicaDied
from deployments.transport.socket import FrameReceiver
from tests.unit.deployments.handles import FakeHandle, answering

M = Residency("m", "gguf", "a", "node", 2048, 0.1)
M_AGAIN = Residency("m", "gguf", "a", "node", 2048, 0.2)
N = Residency("n", "onnx", "b", "node", 512, 0.3)


def published(version: int, *residencies: Residency) -> ModelStates:
    return ModelStates(residencies=residencies, version=version)


class Scheduler:
    """Leaves every call open until the test answers it."""

    def __init__(self) -> None:
        self.handle: Any = FakeHandle(model_states=self._wait)
        self._calls: list[tuple[int, asyncio.Future[ModelStates]]] = []
        self._called = asyncio.Event()

    async def _wait(self, known_version: int) -> ModelStates:
        answer: asyncio.Future[ModelStates] = asyncio.get_running_loop().create_future()
        self._calls.append((known_version, answer))
        self._called.set()
        return await answer

    async def call(self) -> tuple[int, "asyncio.Future[ModelStates]"]:
        """Return the next call's known version and its open answer."""
        while not self._calls:
            self._called.clear()
            await asyncio.wait_for(self._called.wait(), 30)
        return self._calls.pop(0)

    async def answer(self, states: ModelStates | Exception) -> int:
        """Answer the next call; return the version that it said it knew."""
        known_version, answer = await self.call()
        give(answer, states)
        return known_version

    @property
    def open_calls(self) -> int:
        return len(self._calls)


def give(answer: "asyncio.Future[ModelStates]", states: ModelStates | Exception) -> None:
    if isinstance(states, Exception):
        answer.set_exception(states)
    else:
        answer.set_result(states)


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Scheduler:
    monkeypatch.setattr(model_states_module, "_POLL_PAUSE_S", 0.0)
    monkeypatch.setattr(model_states_module, "_FIRST_BACK_OFF_S", 0.0)
    return Scheduler()


@pytest.fixture
async def states(scheduler: Scheduler) -> ModelStatesWatch:
    """States that are not polled: the test says when they are asked for."""
    return ModelStatesWatch(scheduler.handle)


@pytest.fixture
async def polled(scheduler: Scheduler) -> AsyncIterator[ModelStatesWatch]:
    states = ModelStatesWatch(scheduler.handle)
    states.start()
    yield states
    states.stop()


async def asking(
    states: ModelStatesWatch, scheduler: Scheduler
) -> tuple["asyncio.Task[ModelStates]", "asyncio.Future[ModelStates]"]:
    """Return a refresh that the scheduler has received and not answered."""
    refresh = asyncio.create_task(states.refresh())
    _, answer = await scheduler.call()
    return refresh, answer


async def test_one_poll_is_open_at_a_time_and_names_the_version_it_knows(
    polled: ModelStatesWatch, scheduler: Scheduler
) -> None:
    assert await scheduler.answer(published(7, M)) == -1
    known_version, answer = await scheduler.call()
    assert (known_version, scheduler.open_calls) == (7, 0)
    assert dict(polled.residencies) == {"m": M}
    assert polled.resident_formats == {"gguf"}
    give(answer, published(8, N))
    assert await scheduler.answer(published(8, N)) == 8
    assert dict(polled.residencies) == {"n": N}


async def test_an_eviction_that_is_published_is_believed(
    polled: ModelStatesWatch, scheduler: Scheduler
) -> None:
    await scheduler.answer(published(1))
    _, answer = await scheduler.call()
    polled.note_loaded(M)
    # This call was made before the load's answer: it does not undo the load, and is repeated.
    give(answer, published(2, N))
    known_version, answer = await scheduler.call()
    assert known_version == -1
    assert dict(polled.residencies) == {"m": M, "n": N}
    give(answer, published(2, N))
    assert (await scheduler.call())[0] == 2
    assert dict(polled.residencies) == {"n": N}


async def test_states_asked_for_before_a_load_do_not_undo_it(
    states: ModelStatesWatch, scheduler: Scheduler
) -> None:
    refresh, answer = await asking(states, scheduler)
    states.note_loaded(M_AGAIN)
    give(answer, published(1, M))
    await refresh
    assert dict(states.residencies) == {"m": M_AGAIN}
    refresh, answer = await asking(states, scheduler)
    give(answer, published(1, M))
    await refresh
    assert dict(states.residencies) == {"m": M}


async def test_the_answer_to_an_earlier_call_that_comes_last_is_dropped(
    states: ModelStatesWatch, scheduler: Scheduler
) -> None:
    early, early_answer = await asking(states, scheduler)
    late, late_answer = await asking(states, scheduler)
    give(late_answer, published(5, N))
    await late
    give(early_answer, published(4, M))
    await early
    assert (dict(states.residencies), states.current.version) == ({"n": N}, 5)


async def test_a_newer_version_counts_although_its_call_was_made_earlier(
    states: ModelStatesWatch, scheduler: Scheduler
) -> None:
    early, early_answer = await asking(states, scheduler)
    late, late_answer = await asking(states, scheduler)
    give(late_answer, published(5, N))
    await late
    give(early_answer, published(6, M))
    await early
    assert (dict(states.residencies), states.current.version) == ({"m": M}, 6)


async def test_a_load_that_a_replica_denied_stays_out_while_it_is_still_published(
    states: ModelStatesWatch, scheduler: Scheduler
) -> None:
    states.note_loaded(M)
    states.note_lost(M)
    assert not states.residencies
    for version in (1, 2):
        refresh, answer = await asking(states, scheduler)
        give(answer, published(version, M, N))
        await refresh
        assert dict(states.residencies) == {"n": N}


async def test_another_load_in_the_same_process_is_believed_after_a_loss(
    states: ModelStatesWatch, scheduler: Scheduler
) -> None:
    states.note_loaded(M)
    states.note_lost(M)
    refresh, answer = await asking(states, scheduler)
    give(answer, published(1, M_AGAIN))
    await refresh
    assert dict(states.residencies) == {"m": M_AGAIN}
    # What a request reports late, of the load before, does not concern this one.
    states.note_lost(M)
    assert dict(states.residencies) == {"m": M_AGAIN}


async def test_a_loss_is_forgotten_once_the_scheduler_knows_of_it(
    states: ModelStatesWatch, scheduler: Scheduler
) -> None:
    states.note_lost(M)
    for version, expected in ((1, {}), (2, {"m": M})):
        refresh, answer = await asking(states, scheduler)
        give(answer, published(version, *expected.values()))
        await refresh
        assert dict(states.residencies) == expected


@pytest.mark.parametrize("problem", [Unavailable("away"), ReplicaDied("gone"), ModelStates()])
async def test_a_scheduler_that_does_not_know_leaves_the_last_states_valid(
    polled: ModelStatesWatch, scheduler: Scheduler, problem: ModelStates | Exception
) -> None:
    await scheduler.answer(published(3, M))
    for _ in range(3):
        assert await scheduler.answer(problem) == 3
        assert dict(polled.residencies) == {"m": M}
    await scheduler.answer(published(1, N))
    await scheduler.call()
    assert (dict(polled.residencies), polled.current.version) == ({"n": N}, 1)


async def test_a_failing_scheduler_is_asked_less_and_less_often(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    sleep = asyncio.sleep

    async def note_sleep(seconds: float) -> None:
        waits.append(seconds)
        await sleep(0)

    monkeypatch.setattr(model_states_module, "_FIRST_BACK_OFF_S", 0.5)
    monkeypatch.setattr("deployments.router.model_states.asyncio.sleep", note_sleep)
    states = ModelStatesWatch(scheduler.handle)
    states.start()
    for _ in range(7):
        await scheduler.answer(Unavailable("away"))
    await scheduler.answer(published(1))
    await scheduler.answer(KeyError("a bug"))
    await scheduler.call()
    states.stop()
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0, 0.0, 0.5]


async def test_memory_of_a_job_takes_no_requests(
    states: ModelStatesWatch, scheduler: Scheduler
) -> None:
    refresh, answer = await asking(states, scheduler)
    give(answer, published(1, Residency("job", "", "", "node", 0, 0.0), N))
    await refresh
    assert dict(states.residencies) == {"n": N}


def embedding(
    states: ModelStatesWatch, scheduler: FakeHandle, *outcomes: Any
) -> tuple[HandleDispatcher, FakeHandle]:
    replica = FakeHandle(embed=answering(*outcomes))
    handles: Any = {"gguf": replica, "onnx": replica}
    known: Any = scheduler
    deaths = DeathRecords(Path("/nonexistent"))
    return HandleDispatcher(known, handles, FrameReceiver(), "node", states, deaths), replica


async def test_a_request_to_a_published_model_does_not_call_the_scheduler(
    states: ModelStatesWatch, scheduler: Scheduler
) -> None:
    refresh, answer = await asking(states, scheduler)
    give(answer, published(1, N))
    await refresh
    vectors: Any = Embeddings.__new__(Embeddings)
    subject, replica = embedding(states, FakeHandle(), vectors)
    assert await subject.embed("n", ["x"]) is vectors
    assert len(replica.embed.calls) == 1


async def test_a_request_after_a_published_eviction_asks_for_a_load_first(
    states: ModelStatesWatch, scheduler: Scheduler
) -> None:
    loads = FakeHandle(ensure_loaded=answering(M, M_AGAIN))
    subject, replica = embedding(states, loads, "vectors")
    await subject.embed("m", ["x"])
    await subject.embed("m", ["x"])
    assert len(loads.ensure_loaded.calls) == 1
    refresh, answer = await asking(states, scheduler)
    give(answer, published(2))
    await refresh
    await subject.embed("m", ["x"])
    needs = [need for _, need in loads.ensure_loaded.calls]
    assert [need.lost_replica for need in needs] == ["", ""]
    assert len(replica.embed.calls) == 3


async def test_a_death_takes_the_model_out_at_once(states: ModelStatesWatch) -> None:
    loads = FakeHandle(ensure_loaded=answering(M), process_died=answering(None))
    subject, _ = embedding(states, loads, ReplicaDied("died"))
    with pytest.raises(CrashingRequest):
        await subject.embed("m", ["x"])
    assert not states.residencies
