"""The way to a replica and back, when it works and when the replica does not."""

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest
from ray.exceptions import RayActorError

from core.errors import (
    ContextLengthExceeded,
    CrashingRequest,
    EngineFailed,
    InsufficientMemory,
    ModelNotResident,
    TimedOut,
)
from core.types import (
    CacheOutcome,
    Embeddings,
    Finished,
    GenerationEvent,
    GenerationRequest,
    PrefillProgress,
    ReasoningDelta,
    RequestGroup,
    RerankInputs,
    TextDelta,
    TextPrompt,
    Timing,
    TokenizedPrompt,
    TokenizeOptions,
    ToolCallDelta,
    Usage,
)
from deployments.activity import DeathCause
from deployments.decisions import DecisionLog
from deployments.messages import Attempt, Residency
from deployments.router.dispatch import HandleDispatcher
from deployments.router.model_states import ModelStatesWatch
from deployments.serve.handles import ReplicaDied
from deployments.transport.codec import encode_frame, encode_frames
from deployments.transport.socket import FrameReceiver, FrameSender
from router.answers.event_feed import EventFeed
from tests.unit.deployments.handles import FakeHandle, answering

REQUEST = GenerationRequest("r", "m", TextPrompt("hi"))
END = Finished("stop", Usage(1, 1))
NOT_RESIDENT = ModelNotResident("m is not resident here.")


def residency(replica_id: str) -> Residency:
    return Residency("m", "gguf", replica_id, "node", 2048, 0.1)


def loads(*replica_ids: str) -> FakeHandle:
    return FakeHandle(
        ensure_loaded=answering(*map(residency, replica_ids)), process_died=answering(None)
    )


def lost(scheduler: FakeHandle) -> list[str]:
    """Return for every call of the scheduler where the model was believed to be."""
    return [need.lost_replica for _, need in scheduler.ensure_loaded.calls]


@pytest.fixture
async def receiver() -> AsyncIterator[FrameReceiver]:
    receiver = FrameReceiver()
    await receiver.start()
    yield receiver
    await receiver.stop()


class Deaths:
    """What processes died of, by replica; those that are not named left no record."""

    def __init__(self, **causes: DeathCause) -> None:
        self._causes = causes

    async def cause(self, replica_id: str) -> DeathCause | None:
        return self._causes.get(replica_id)


def dispatcher(
    receiver: FrameReceiver,
    scheduler: FakeHandle,
    replica: FakeHandle,
    log: DecisionLog | None = None,
    deaths: "Deaths | None" = None,
) -> HandleDispatcher:
    handles: Any = {"gguf": replica}
    known: Any = scheduler
    states = ModelStatesWatch(known)
    records: Any = deaths or Deaths()
    return HandleDispatcher(known, handles, receiver, "node", states, records, log=log)


def sending(*outcomes: Any) -> Any:
    """Return a replica's `generate`: each call sends its events, then raises its error if any."""
    left = list(outcomes)

    async def generate(request: GenerationRequest, path: str, attempt: Attempt) -> None:
        assert attempt.request_id == request.id
        events, problem = left.pop(0)
        with closing(FrameSender(path)) as sender:
            for event in events:
                sender.deliver([(request.id, [event])])
            # The router's loop must read the frames before it hears of the failure.
            for _ in range(20):
                await asyncio.sleep(0)
        if problem is not None:
            raise problem

    return generate


async def collect(
    dispatcher: HandleDispatcher, request: GenerationRequest = REQUEST
) -> list[GenerationEvent]:
    """Return the events, the last without its timing, of which other tests tell."""
    events: list[GenerationEvent] = []
    await dispatcher.generate(request, events.extend)
    return [
        replace(event, timing=Timing()) if isinstance(event, Finished) else event
        for event in events
    ]


async def test_generate_yields_the_events_and_asks_the_scheduler_once(
    receiver: FrameReceiver,
) -> None:
    scheduler = loads("a")
    events = [TextDelta("x", (1,)), END]
    replica = FakeHandle(generate=sending((events, None), (events, None)))
    subject = dispatcher(receiver, scheduler, replica)
    assert await collect(subject) == events
    assert await collect(subject) == events
    await subject.close()
    assert lost(scheduler) == [""]
    assert set(subject._model_states.residencies) == {"m"}


async def test_a_replica_without_the_model_costs_a_load_and_nothing_else(
    receiver: FrameReceiver,
) -> None:
    scheduler = loads("a", "b")
    replica = FakeHandle(generate=sending(([], NOT_RESIDENT), ([END], None)))
    subject = dispatcher(receiver, scheduler, replica)
    assert await collect(subject) == [END]
    await subject.close()
    assert lost(scheduler) == ["", "a"]


async def test_a_replica_that_dies_before_the_first_event_is_not_the_clients_problem(
    receiver: FrameReceiver,
) -> None:
    scheduler = loads("a", "b")
    replica = FakeHandle(generate=sending(([], RayActorError()), ([END], None)))
    subject = dispatcher(receiver, scheduler, replica)
    assert await collect(subject) == [END]
    await subject.close()


def requests_of(replica: FakeHandle) -> list[GenerationRequest]:
    return [arguments[0] for arguments in replica.generate.calls]


async def test_a_replica_that_dies_later_is_followed_by_one_that_goes_on(
    receiver: FrameReceiver,
) -> None:
    scheduler = loads("a", "b", "c")
    first = [PrefillProgress(1, 2), TextDelta("x", (1, 2)), ReasoningDelta("y", (3,))]
    second: list[GenerationEvent] = [ToolCallDelta(0, "id", "f"), TextDelta("z", (4,))]
    third = [TextDelta("!", (5,)), END]
    died = RayActorError()
    replica = FakeHandle(generate=sending((first, died), (second, died), (third, None)))
    subject = dispatcher(receiver, scheduler, replica)
    assert await collect(subject) == [*first, *second, *third]
    await subject.close()
    attempts = requests_of(replica)
    assert [attempt.generated for attempt in attempts] == [(), (1, 2, 3), (1, 2, 3, 4)]
    assert len({attempt.id for attempt in attempts}) == 3
    assert lost(scheduler) == ["", "a", "b"]


async def test_an_echoed_prompt_is_not_sent_again(receiver: FrameReceiver) -> None:
    died = RayActorError()
    replica = FakeHandle(
        generate=sending(([TextDelta("hi")], died), ([TextDelta("x", (1,)), END], None))
    )
    subject = dispatcher(receiver, loads("a", "b"), replica)
    events = await collect(subject, replace(REQUEST, echo_prompt=True))
    await subject.close()
    assert events == [TextDelta("hi"), TextDelta("x", (1,)), END]
    assert [attempt.echo_prompt for attempt in requests_of(replica)] == [True, False]


async def test_text_without_tokens_cannot_be_continued(receiver: FrameReceiver) -> None:
    replica = FakeHandle(generate=sending(([TextDelta("x")], RayActorError())))
    events: list[GenerationEvent] = []
    with pytest.raises(EngineFailed, match="died"):
        await dispatcher(receiver, loads("a"), replica).generate(REQUEST, events.extend)
    assert events == [TextDelta("x")]
    assert len(requests_of(replica)) == 1


async def test_a_stream_that_is_lost_three_times_ends_with_an_error(
    receiver: FrameReceiver,
) -> None:
    dying = [([TextDelta("x", (number,))], RayActorError()) for number in range(3)]
    replica = FakeHandle(generate=sending(*dying))
    events: list[GenerationEvent] = []
    with pytest.raises(EngineFailed, match="died"):
        await dispatcher(receiver, loads("a", "b", "c"), replica).generate(REQUEST, events.extend)
    assert events == [TextDelta("x", (number,)) for number in range(3)]


async def test_a_replica_that_dies_while_it_loads_costs_another_attempt(
    receiver: FrameReceiver,
) -> None:
    died = ReplicaDied("died")
    scheduler = FakeHandle(ensure_loaded=answering(residency("a"), died, residency("b")))
    replica = FakeHandle(generate=sending(([TextDelta("x", (1,))], RayActorError()), ([END], None)))
    subject = dispatcher(receiver, scheduler, replica)
    assert await collect(subject) == [TextDelta("x", (1,)), END]
    await subject.close()
    assert lost(scheduler) == ["", "a", "a"]


async def test_a_request_without_any_answer_is_sent_twice_where_nothing_tells_the_cause(
    receiver: FrameReceiver,
) -> None:
    replica = FakeHandle(generate=sending(*[([], RayActorError())] * 3))
    with pytest.raises(CrashingRequest, match="died twice"):
        await collect(dispatcher(receiver, loads("a", "b", "c"), replica))
    assert len(replica.generate.calls) == 2


async def test_errors_that_travel_as_values_are_raised(receiver: FrameReceiver) -> None:
    problem = ContextLengthExceeded.of(10, 5)
    replica = FakeHandle(generate=answering(problem))
    with pytest.raises(ContextLengthExceeded):
        await collect(dispatcher(receiver, loads("a"), replica))


async def test_a_refused_load_reaches_the_client(receiver: FrameReceiver) -> None:
    scheduler = FakeHandle(ensure_loaded=answering(InsufficientMemory("too large")))
    with pytest.raises(InsufficientMemory):
        await collect(dispatcher(receiver, scheduler, FakeHandle()))


async def test_one_sequence_of_a_group_asks_for_the_model(receiver: FrameReceiver) -> None:
    loaded = asyncio.Event()

    async def ensure_loaded(*_: object) -> Residency:
        await loaded.wait()
        return residency("a")

    async def generate(request: GenerationRequest, path: str, attempt: Attempt) -> None:
        del attempt
        with closing(FrameSender(path)) as sender:
            sender.deliver([(request.id, [END])])
            for _ in range(20):
                await asyncio.sleep(0)

    scheduler = FakeHandle(ensure_loaded=ensure_loaded)
    router = dispatcher(receiver, scheduler, FakeHandle(generate=generate))
    group = RequestGroup("r", 8)
    tasks = [
        asyncio.ensure_future(
            router.generate(replace(REQUEST, id=f"r-{index}", group=group), lambda _: None)
        )
        for index in range(8)
    ]
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(scheduler.ensure_loaded.calls) == 1
    # One that leaves takes no turn from the others.
    tasks[0].cancel()
    loaded.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(outcomes[0], asyncio.CancelledError)
    assert outcomes[1:] == [None] * 7
    assert len(scheduler.ensure_loaded.calls) <= 2
    await router.generate(replace(REQUEST, id="t", group=RequestGroup("t", 1)), lambda _: None)
    gc.collect()
    assert "t" not in router._load_turns


async def test_cancelling_the_request_cancels_the_call(receiver: FrameReceiver) -> None:
    async def generate(request: GenerationRequest, path: str, _: Attempt) -> None:
        with closing(FrameSender(path)) as sender:
            sender.deliver([(request.id, [TextDelta("x")])])
            await asyncio.Event().wait()

    replica = FakeHandle(generate=generate)
    has_begun = asyncio.Event()
    subject = dispatcher(receiver, loads("a"), replica)
    running = asyncio.ensure_future(subject.generate(REQUEST, lambda _: has_begun.set()))
    await has_begun.wait()
    running.cancel()
    await asyncio.wait([running])
    assert replica.generate.responses[0].is_cancelled


async def test_a_call_outlives_a_reader_that_leaves_with_the_end(receiver: FrameReceiver) -> None:
    may_return = asyncio.Event()

    async def generate(request: GenerationRequest, path: str, _: Attempt) -> None:
        with closing(FrameSender(path)) as sender:
            sender.deliver([(request.id, [TextDelta("x", (1,))])])
            sender.deliver([(request.id, [replace(END, mismatches=("schema",))])])
            await may_return.wait()

    async def stay_connected() -> NoReturn:
        await asyncio.Event().wait()
        raise AssertionError

    replica, log = FakeHandle(generate=generate), DecisionLog()
    subject = dispatcher(receiver, loads("a"), replica, log)
    async with EventFeed(subject.generate, [REQUEST], stay_connected) as feed:
        while await feed.next() is not None:
            pass
    assert not replica.generate.responses[0].is_cancelled
    assert [one.event for one in log.last()] == ["tool call"]
    may_return.set()
    await subject.close()


class FakeFrames:
    """What `handle.options(stream=True).stream.remote()` returns."""

    def __init__(self, *events: GenerationEvent) -> None:
        self._frames = [encode_frame([("r", [event])]) for event in events]
        self.is_cancelled = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for frame in self._frames:
            yield frame

    def cancel(self) -> None:
        self.is_cancelled = True


async def test_a_replica_on_another_node_streams_by_its_handle(receiver: FrameReceiver) -> None:
    far = Residency("m", "gguf", "a", "another node", 2048, 0.1)
    frames = FakeFrames(TextDelta("x", (1,)), END)
    stream = SimpleNamespace(remote=lambda _request, _attempt: frames)
    replica: Any = SimpleNamespace(stream=stream, options=lambda **_: replica)
    scheduler = FakeHandle(ensure_loaded=answering(far))
    assert await collect(dispatcher(receiver, scheduler, replica)) == [TextDelta("x", (1,)), END]
    assert frames.is_cancelled


@pytest.mark.parametrize("is_remote", [False, True])
async def test_an_event_that_is_lost_on_the_way_ends_its_request(
    receiver: FrameReceiver, is_remote: bool
) -> None:
    bad: Any = object()
    far = Residency("m", "gguf", "a", "another node", 2048, 0.1)
    frames = FakeFrames(TextDelta("x", (1,)))
    frames._frames += encode_frames([("r", [bad])])
    stream = SimpleNamespace(remote=lambda _request, _attempt: frames)
    replica: Any = SimpleNamespace(stream=stream, options=lambda **_: replica)
    near = FakeHandle(generate=sending(([TextDelta("x", (1,)), bad], None)))
    scheduler = FakeHandle(ensure_loaded=answering(far)) if is_remote else loads("a")
    subject = dispatcher(receiver, scheduler, replica if is_remote else near)
    events: list[GenerationEvent] = []
    with pytest.raises(EngineFailed, match="part of the answer was lost"):
        await subject.generate(REQUEST, events.extend)
    assert events == [TextDelta("x", (1,))]
    await subject.close()


async def test_embed_tries_again_where_the_model_was_lost(receiver: FrameReceiver) -> None:
    embeddings = Embeddings(np.ones((1, 2), np.float32), 1)
    replica = FakeHandle(embed=answering(NOT_RESIDENT, RayActorError(), embeddings))
    subject = dispatcher(receiver, loads("a", "b", "c"), replica)
    assert await subject.embed("m", ["x"]) is embeddings


async def test_tokens_are_counted_where_the_model_is(receiver: FrameReceiver) -> None:
    replica = FakeHandle(count_tokens=answering(NOT_RESIDENT, 17))
    subject = dispatcher(receiver, loads("a", "b"), replica)
    assert await subject.count_tokens("m", TextPrompt("hi")) == 17
    model_id, prompt, deadline_s, attempt = replica.count_tokens.calls[-1]
    assert (model_id, prompt, deadline_s) == ("m", TextPrompt("hi"), None)
    assert attempt.replica_id == "b"


async def test_a_prompt_is_tokenized_where_the_model_is(receiver: FrameReceiver) -> None:
    found = TokenizedPrompt("hi", (104, 105), (b"h", b"i"))
    replica = FakeHandle(tokenize=answering(NOT_RESIDENT, found))
    subject = dispatcher(receiver, loads("a", "b"), replica)
    options = TokenizeOptions(add_special=False)
    assert await subject.tokenize("m", TextPrompt("hi"), options) is found
    *asked, attempt = replica.tokenize.calls[-1]
    assert asked == ["m", TextPrompt("hi"), options, None]
    assert attempt.replica_id == "b"


async def test_embed_gives_up_after_three_attempts(receiver: FrameReceiver) -> None:
    replica = FakeHandle(embed=answering(NOT_RESIDENT))
    with pytest.raises(EngineFailed):
        await dispatcher(receiver, loads("a"), replica).embed("m", ["x"])


@pytest.mark.parametrize("method", ["embed", "rerank", "count_tokens", "tokenize"])
async def test_f3_a_call_that_hangs_ends_after_its_deadline(
    receiver: FrameReceiver, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    async def hang(*arguments: Any) -> None:
        assert 0.02 in arguments
        await asyncio.Event().wait()

    monkeypatch.setattr("deployments.router.dispatch._DEADLINE_GRACE_S", 0.0)
    subject = dispatcher(receiver, loads("a"), FakeHandle(**{method: hang}))
    asked: Any = {"embed": ["x"], "rerank": RerankInputs("q", ("d",))}.get(method, TextPrompt("hi"))
    options = [TokenizeOptions()] if method == "tokenize" else []
    with pytest.raises(TimedOut) as caught:
        await getattr(subject, method)("m", asked, *options, deadline_s=0.02)
    assert caught.value.status == 504


async def test_f3_a_process_that_hangs_as_a_whole_ends_the_request_after_its_deadline(
    receiver: FrameReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr("deployments.router.dispatch._DEADLINE_GRACE_S", 0.0)
    subject = dispatcher(receiver, loads("a"), FakeHandle(generate=hang))
    with pytest.raises(TimedOut):
        await collect(subject, replace(REQUEST, deadline_s=0.01))


async def test_f11_the_scheduler_is_told_of_every_death(receiver: FrameReceiver) -> None:
    scheduler = loads("a", "b", "c")
    dying = ([TextDelta("x", (1,))], RayActorError())
    replica = FakeHandle(generate=sending(dying, dying, dying))
    with pytest.raises(EngineFailed):
        await collect(dispatcher(receiver, scheduler, replica))
    needs = [need for _, need in scheduler.ensure_loaded.calls]
    assert [(need.lost_replica, need.has_died) for need in needs] == [
        ("", False),
        ("a", True),
        ("b", True),
    ]
    assert scheduler.process_died.calls == [("m", "c")]


async def test_an_answer_that_has_begun_is_asked_for_as_such(receiver: FrameReceiver) -> None:
    scheduler = loads("a", "b")
    begun = [TextDelta("x", (1,))]
    replica = FakeHandle(generate=sending((begun, NOT_RESIDENT), ([END], None)))
    await collect(dispatcher(receiver, scheduler, replica))
    needs = [need for _, need in scheduler.ensure_loaded.calls]
    assert [(need.is_resumed, need.has_died) for need in needs] == [(False, False), (True, False)]


async def test_what_is_amiss_with_an_answer_is_among_the_decisions(receiver: FrameReceiver) -> None:
    cache = CacheOutcome(miss="diverged", diverged_at=21)
    end = Finished("stop", Usage(1000, 1), mismatches=("schema", "schema"), cache=cache)
    log = DecisionLog()
    subject = dispatcher(receiver, loads("a"), FakeHandle(generate=sending(([end], None))), log)
    await collect(subject)
    await subject.close()
    assert [(one.event, one.reason) for one in log.last()] == [
        ("tool call", "calls do not fit: schema"),
        ("cache miss", "1000 tokens were not reused: diverged at token 21"),
    ]
