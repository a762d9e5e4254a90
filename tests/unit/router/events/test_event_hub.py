"""Readers of events: where they begin, what they miss, and what following them costs."""

import asyncio

import pytest

from core.errors import Unavailable
from core.metrics import TokenCount
from router.events.hub import MAX_READERS, EventHub, KnownState
from tests.unit.router.events.sources import (
    FakeSources,
    decision,
    job_view,
    model_event,
    parsed,
    progress,
)


@pytest.fixture
def sources() -> FakeSources:
    return FakeSources()


@pytest.fixture
async def hub(sources: FakeSources) -> EventHub:
    return EventHub(sources, linger_s=0.05, clock=lambda: 7.0)


def types(text: str) -> list[str]:
    return [kind for _, kind, _ in parsed(text)]


async def test_without_readers_nothing_is_followed_or_kept(
    hub: EventHub, sources: FakeSources
) -> None:
    hub.publish(model_event("a"))
    hub.requests.start("r", "/v1/chat/completions", "m")
    hub.requests.finish("r", 200, 1.0, TokenCount())
    assert not hub.is_active
    assert sources.starts == 0
    with hub.reader("") as reader:
        assert hub.is_active
        assert types(reader.take()) == ["reset"]
        assert reader.take() == ""
    await asyncio.sleep(0.1)
    assert not hub.is_active
    assert sources.publish is None


async def test_every_event_after_the_state_is_delivered_and_none_before(
    hub: EventHub, sources: FakeSources
) -> None:
    sources.news = [model_event("early")]
    sources.known_now = KnownState(jobs=[job_view()], missing={"machine": "gone"})
    state = await hub.state()
    assert (state.jobs, state.missing, state.at) == ((job_view(),), {"machine": "gone"}, 7.0)
    # Between the state and the stream: the race that a client cannot win.
    hub.publish(model_event("late"))
    with hub.reader(state.event_id) as reader:
        hub.publish(model_event("later"))
        found = parsed(reader.take())
    assert [data["model"]["id"] for _, _, data in found] == ["late", "later"]


async def test_a_reader_that_comes_back_gets_exactly_what_it_missed(hub: EventHub) -> None:
    with hub.reader("") as reader:
        reader.take()
        hub.publish(decision("seen"))
        ((last_id, _, _),) = parsed(reader.take())
    for number in range(200):
        hub.publish(decision(str(number)))
    with hub.reader(last_id) as reader:
        found = []
        while text := reader.take():
            found += [data["reason"] for _, _, data in parsed(text)]
    assert found == [str(number) for number in range(200)]


async def test_ids_of_another_run_and_too_old_ones_reset(hub: EventHub) -> None:
    state = await hub.state()
    await asyncio.sleep(0.1)
    assert not hub.is_active
    with hub.reader(state.event_id) as reader:
        ((last_id, kind, data),) = parsed(reader.take())
        assert (kind, data) == ("reset", {"at": 7.0, "type": "reset", "reason": "unknown_id"})
        for number in range(1001):
            hub.publish(decision(str(number)))
        # A reader that was slow, and one that comes back, are told the same.
        assert parsed(reader.take())[0][2]["reason"] == "too_old"
        assert reader.take() == ""
        with hub.reader(last_id) as other:
            assert parsed(other.take())[0][2]["reason"] == "too_old"
            hub.publish(decision("new"))
            assert types(other.take()) == types(reader.take()) == ["decision"]


async def test_a_slow_reader_skips_progress_that_is_replaced(hub: EventHub) -> None:
    with hub.reader("") as reader:
        reader.take()
        hub.publish(model_event("a"))
        for done in range(3000):
            hub.publish(progress("j1", done), subject="j1")
        found = parsed(reader.take())
    assert [kind for _, kind, _ in found] == ["model.state", "job.progress"]
    assert found[-1][2]["job"]["done_bytes"] == 2999


async def test_a_waiting_reader_wakes_at_an_event(hub: EventHub) -> None:
    with hub.reader("") as reader:
        reader.take()
        waiting = asyncio.ensure_future(reader.wait(30.0))
        await asyncio.sleep(0)
        hub.publish(model_event("a"))
        await asyncio.wait_for(waiting, 5)
        assert types(reader.take()) == ["model.state"]
        await reader.wait(0.01)
        assert reader.take() == ""


async def test_readers_are_bounded_and_end_when_the_server_stops(
    hub: EventHub, sources: FakeSources
) -> None:
    readers = [hub.reader("") for _ in range(MAX_READERS)]
    for reader in readers:
        reader.__enter__()
    with pytest.raises(Unavailable, match="64 event streams"):
        hub.reader("")
    readers.pop().__exit__(None, None, None)
    assert not hub.reader("").has_ended
    hub.close()
    assert all(reader.has_ended for reader in readers)
    assert sources.publish is None
    with pytest.raises(Unavailable, match="stopping"):
        hub.reader("")


async def test_requests_are_told_with_their_numbers(hub: EventHub) -> None:
    count = TokenCount(10, 4, 20, first_token_s=0.25, decode_s=2.0)
    with hub.reader("") as reader:
        reader.take()
        hub.requests.start("req_1", "/v1/chat/completions", "m")
        hub.requests.start("req_1", "/v1/chat/completions", "m")
        (running,) = (await hub.state()).requests
        hub.requests.finish("req_1", 200, 2.5, count)
        hub.requests.finish("req_2", 404, 0.1, TokenCount())
        (_, first, _), (_, second, data) = parsed(reader.take())
    assert (first, second) == ("request.started", "request.finished")
    assert data["request"] == running.model_dump()
    assert (data["status"], data["duration_ms"], data["first_token_ms"]) == (200, 2500.0, 250.0)
    assert (data["prompt_tokens"], data["cached_tokens"], data["completion_tokens"]) == (10, 4, 20)
    assert data["tokens_per_s"] == 10.0
    assert (await hub.state()).requests == ()
