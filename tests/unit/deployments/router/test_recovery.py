"""Requests whose process died: the cause is sent once more and alone, the others go on."""

import asyncio
import pickle
import threading
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayActorError

from core.errors import CrashingRequest, EngineFailed
from core.types import (
    Embeddings,
    GenerationRequest,
    PrefillProgress,
    SamplingParams,
    TextDelta,
    TextPrompt,
)
from deployments.activity import DeathCause, request_key
from deployments.decisions import DecisionLog
from deployments.messages import Attempt, LoadContext, Residency
from deployments.router.crashing import CrashingRequests
from deployments.router.dispatch import HandleDispatcher
from deployments.router.model_states import ModelStatesWatch
from deployments.router.targets import Targets
from deployments.serve.handles import ReplicaDied
from deployments.transport.socket import FrameReceiver, FrameSender
from tests.unit.backends.engine.test_batching import until
from tests.unit.deployments.handles import FakeHandle, answering
from tests.unit.deployments.router.test_dispatch import (
    END,
    REQUEST,
    Deaths,
    collect,
    dispatcher,
    loads,
    receiver,
    requests_of,
    residency,
    sending,
)

__all__ = ["receiver"]

DIED = RayActorError()


def caused_by(*request_ids: str, model: str = "m") -> DeathCause:
    return DeathCause(frozenset({model}), frozenset(map(request_key, request_ids)))


def successive(*replica_ids: str) -> FakeHandle:
    """A scheduler whose processes follow each other, whoever asks and how often."""

    async def ensure_loaded(_: str, context: LoadContext) -> Residency:
        after = ["", *replica_ids].index(context.lost_replica)
        return residency(replica_ids[min(after, len(replica_ids) - 1)])

    return FakeHandle(ensure_loaded=ensure_loaded, process_died=answering(None))


def attempts_of(replica: FakeHandle, method: str = "generate") -> list[Attempt]:
    return [arguments[-1] for arguments in getattr(replica, method).calls]


async def test_a_request_that_kills_its_process_is_sent_once_more_and_not_again(
    receiver: FrameReceiver,
) -> None:
    scheduler, log = loads("a", "b", "c"), DecisionLog()
    replica = FakeHandle(generate=sending(*[([PrefillProgress(1, 2)], DIED)] * 3))
    deaths = Deaths(a=caused_by("r.0"), b=caused_by("r.1"))
    with pytest.raises(CrashingRequest):
        await collect(dispatcher(receiver, scheduler, replica, log, deaths))
    assert attempts_of(replica) == [Attempt("r.0", "a"), Attempt("r.1", "b", is_suspect=True)]
    # The last death is told as well, since no further load tells of it.
    assert scheduler.process_died.calls == [("m", "b")]
    assert [one.action for one in log.last()] == ["send a request to m once more"]


async def test_a_request_that_ended_two_processes_is_not_run_again_by_any_client(
    receiver: FrameReceiver,
) -> None:
    replica = FakeHandle(generate=sending(([], DIED), ([], DIED), ([END], None), ([END], None)))
    deaths = Deaths(a=caused_by("r.0"), b=caused_by("r.1"))
    subject = dispatcher(receiver, successive("a", "b", "c"), replica, deaths=deaths)
    with pytest.raises(CrashingRequest, match="so the request is not sent again"):
        await collect(subject)
    # Whatever its id, class or sampling.
    again = replace(REQUEST, id="s", priority="batch", sampling=SamplingParams(seed=7))
    with pytest.raises(CrashingRequest, match="refused for 5 minutes"):
        await collect(subject, again)
    assert len(replica.generate.calls) == 2
    # Another text is run, and so is the same one on another model.
    assert await collect(subject, replace(REQUEST, id="t", prompt=TextPrompt("ho"))) == [END]
    states = subject._model_states
    states.note_loaded(replace(residency("c"), model_id="other"))
    assert await collect(subject, replace(REQUEST, id="u", model_id="other")) == [END]
    await subject.close()


async def test_crashing_requests_are_forgotten_after_a_while_and_within_a_bound() -> None:
    now = 100.0
    known = CrashingRequests(lambda: now)
    await known.check("m", "text")
    await known.note("m", TextPrompt("\ud83d"))
    await known.check("m", TextPrompt("other"))
    await known.check("other", TextPrompt("\ud83d"))
    now += 299
    with pytest.raises(CrashingRequest, match="299 s ago"):
        await known.check("m", TextPrompt("\ud83d"))
    now += 2
    await known.check("m", TextPrompt("\ud83d"))
    for number in range(100):
        await known.note("m", number)
    assert len(known._ended) == 64
    await known.check("m", 35)
    with pytest.raises(CrashingRequest):
        await known.check("m", 36)


async def test_long_prompts_are_hashed_beside_the_event_loop() -> None:
    threads: list[int] = []

    class Content:
        def __repr__(self) -> str:
            threads.append(threading.get_ident())
            return "text"

    known = CrashingRequests()
    await known.note("m", Content())
    with pytest.raises(CrashingRequest):
        await known.check("m", Content())
    assert len(threads) == 2
    assert threading.get_ident() not in threads


async def test_a_bystander_goes_on_however_often_others_end_its_process(
    receiver: FrameReceiver,
) -> None:
    names = [f"replica{number}" for number in range(8)]
    dying = [([TextDelta("x", (number,))], DIED) for number in range(7)]
    replica = FakeHandle(generate=sending(*dying, ([END], None)))
    deaths = Deaths(**{name: caused_by("other.0", model="other") for name in names})
    events = await collect(dispatcher(receiver, loads(*names), replica, deaths=deaths))
    assert events == [*(TextDelta("x", (number,)) for number in range(7)), END]
    assert requests_of(replica)[-1].generated == tuple(range(7))
    assert not any(attempt.is_suspect for attempt in attempts_of(replica))


async def test_a_queued_request_of_the_same_model_is_no_suspect(receiver: FrameReceiver) -> None:
    replica = FakeHandle(generate=sending(([], DIED), ([], DIED), ([END], None)))
    deaths = Deaths(a=caused_by("killer.0"), b=caused_by("killer.1"))
    assert await collect(dispatcher(receiver, loads("a", "b", "c"), replica, deaths=deaths)) == [
        END
    ]
    assert not any(attempt.is_suspect for attempt in attempts_of(replica))


async def test_suspects_are_computed_one_at_a_time_and_only_one_is_charged(
    receiver: FrameReceiver,
) -> None:
    """Two requests are in the prefill of the step that dies; one of them is innocent."""
    running: list[str] = []
    both = asyncio.Barrier(2)
    may_die = asyncio.Event()

    async def generate(request: GenerationRequest, path: str, attempt: Attempt) -> None:
        if not attempt.is_suspect:
            await both.wait()
            raise DIED
        running.append(request.id)
        assert len(running) == 1
        await may_die.wait()
        # Its prefill is over.
        running.remove(request.id)
        if request.id.startswith("killer"):
            raise DIED
        with closing(FrameSender(path)) as sender:
            sender.deliver([(request.id, [TextDelta("x", (1,)), END])])
            await asyncio.sleep(0.01)

    replica = FakeHandle(generate=generate)
    deaths = Deaths(a=caused_by("killer.0", "good.0"), b=caused_by("killer.1"))
    subject = dispatcher(receiver, successive("a", "b", "c"), replica, deaths=deaths)
    killer = asyncio.ensure_future(collect(subject, replace(REQUEST, id="killer")))
    good = asyncio.ensure_future(collect(subject, replace(REQUEST, id="good")))
    await until(lambda: bool(running))
    may_die.set()
    assert await good == [TextDelta("x", (1,)), END]
    with pytest.raises(CrashingRequest):
        await killer
    assert len(attempts_of(replica)) == 4
    await subject.close()


async def test_a_suspect_whose_answer_has_begun_lets_the_next_one_run(
    receiver: FrameReceiver,
) -> None:
    may_end = asyncio.Event()

    async def generate(request: GenerationRequest, path: str, attempt: Attempt) -> None:
        if not attempt.is_suspect:
            raise DIED
        with closing(FrameSender(path)) as sender:
            sender.deliver([(request.id, [TextDelta(request.id, (1,))])])
            await may_end.wait()
            sender.deliver([(request.id, [END])])
            await asyncio.sleep(0.01)

    replica = FakeHandle(generate=generate)
    deaths = Deaths(a=caused_by("one.0", "two.0"))
    subject = dispatcher(receiver, successive("a", "b"), replica, deaths=deaths)
    begun: list[Any] = []
    works = [
        asyncio.ensure_future(subject.generate(replace(REQUEST, id=name), begun.extend))
        for name in ("one", "two")
    ]
    await until(lambda: {event.text for event in begun} == {"one.1", "two.1"})
    may_end.set()
    await asyncio.gather(*works)
    await subject.close()


@pytest.mark.parametrize("method", ["generate", "count_tokens"])
async def test_a_suspect_whose_model_is_loaded_holds_up_no_other(
    receiver: FrameReceiver, method: str
) -> None:
    is_loaded = asyncio.Event()

    async def ensure_loaded(model_id: str, context: LoadContext) -> Residency:
        if context.has_died and model_id == "slow":
            await is_loaded.wait()
        found = residency("b" if context.has_died else "a")
        return replace(found, model_id=model_id)

    async def answer(*arguments: Any) -> Any:
        if not arguments[-1].is_suspect:
            raise DIED
        if method == "count_tokens":
            return 17
        raise EngineFailed("enough")

    scheduler = FakeHandle(ensure_loaded=ensure_loaded, process_died=answering(None))
    subject = dispatcher(receiver, scheduler, FakeHandle(**{method: answer}))

    async def run(model_id: str) -> Any:
        if method == "count_tokens":
            return await subject.count_tokens(model_id, TextPrompt("x"))
        with pytest.raises(EngineFailed, match="enough"):
            await collect(subject, replace(REQUEST, id=model_id, model_id=model_id))
        return 17

    slow = asyncio.ensure_future(run("slow"))
    await until(lambda: len(scheduler.ensure_loaded.calls) == 2)
    async with asyncio.timeout(30):
        assert await run("quick") == 17
    assert not slow.done()
    is_loaded.set()
    assert await slow == 17
    await subject.close()


async def test_a_suspect_that_is_cancelled_gives_its_turn_away(receiver: FrameReceiver) -> None:
    async def generate(request: GenerationRequest, path: str, attempt: Attempt) -> None:
        del path
        if not attempt.is_suspect:
            raise DIED
        if request.id.startswith("one"):
            await asyncio.Event().wait()
        raise EngineFailed("enough")

    replica = FakeHandle(generate=generate)
    deaths = Deaths(a=caused_by("one.0", "two.0"))
    subject = dispatcher(receiver, successive("a", "b"), replica, deaths=deaths)
    one = asyncio.ensure_future(collect(subject, replace(REQUEST, id="one")))
    await until(lambda: len(replica.generate.calls) == 2)
    two = asyncio.ensure_future(collect(subject, replace(REQUEST, id="two")))
    # The second does not run while the first one does.
    await until(lambda: subject._model_states.residencies != {})
    assert len(replica.generate.calls) <= 3
    one.cancel()
    with pytest.raises(EngineFailed, match="enough"):
        await two
    await asyncio.wait([one])
    await subject.close()


@pytest.mark.parametrize("method", ["embed", "count_tokens"])
async def test_embeddings_and_token_counts_follow_the_same_rules(
    receiver: FrameReceiver, method: str
) -> None:
    async def run(subject: HandleDispatcher) -> Any:
        if method == "embed":
            return await subject.embed("m", ["x"])
        return await subject.count_tokens("m", TextPrompt("x"))

    class Own(Deaths):
        """Each death is the doing of the attempt that was running."""

        async def cause(self, replica_id: str) -> DeathCause | None:
            (attempt,) = [
                one for one in attempts_of(replica, method) if one.replica_id == replica_id
            ]
            return caused_by(attempt.request_id)

    replica = FakeHandle(**{method: answering(DIED)})
    scheduler = loads("a", "b", "c")
    with pytest.raises(CrashingRequest):
        await run(dispatcher(receiver, scheduler, replica, deaths=Own()))
    first, second = attempts_of(replica, method)
    assert (first.is_suspect, second.is_suspect) == (False, True)
    assert first.request_id != second.request_id
    assert scheduler.process_died.calls == [("m", "b")]
    # Deaths that others caused cost it nothing.
    names = [f"replica{number}" for number in range(6)]
    others = Deaths(**{name: caused_by("other.0", model="other") for name in names})
    result = Embeddings(np.ones((1, 2), np.float32), 1)
    replica = FakeHandle(**{method: answering(*[DIED] * 5, result)})
    assert await run(dispatcher(receiver, loads(*names), replica, deaths=others)) is result


async def test_a_model_whose_load_ends_its_process_is_loaded_twice(
    receiver: FrameReceiver,
) -> None:
    scheduler = FakeHandle(ensure_loaded=answering(ReplicaDied("died")))
    with pytest.raises(EngineFailed, match="died twice while it loaded m"):
        await collect(dispatcher(receiver, scheduler, FakeHandle()))
    assert len(scheduler.ensure_loaded.calls) == 2


async def test_a_load_that_died_of_something_else_is_tried_again(receiver: FrameReceiver) -> None:
    problem = ReplicaDied("died")
    problem.is_bystander = True
    copy = pickle.loads(pickle.dumps(problem))
    scheduler = FakeHandle(ensure_loaded=answering(*[copy] * 5, residency("a")))
    replica = FakeHandle(generate=sending(([END], None)))
    subject = dispatcher(receiver, scheduler, replica)
    assert await collect(subject) == [END]
    await subject.close()


async def test_the_schedulers_own_death_is_no_death_of_the_model(receiver: FrameReceiver) -> None:
    scheduler = FakeHandle(ensure_loaded=answering(DIED, DIED, DIED, residency("a")))
    replica = FakeHandle(generate=sending(([END], None)))
    subject = dispatcher(receiver, scheduler, replica)
    assert await collect(subject) == [END]
    await subject.close()


async def test_a_death_drops_every_belief_about_its_process(receiver: FrameReceiver) -> None:
    other = replace(residency("a"), model_id="other")
    elsewhere = replace(residency("far"), model_id="elsewhere")
    scheduler: Any = loads("a", "b")
    replica = FakeHandle(generate=sending(([], DIED), ([END], None)))
    subject = dispatcher(receiver, scheduler, replica, deaths=Deaths(a=caused_by("x")))
    states = subject._model_states
    for known in (other, elsewhere):
        states.note_loaded(known)
    assert await collect(subject) == [END]
    assert set(states.residencies) == {"m", "elsewhere"}
    assert states.residencies["m"].replica_id == "b"
    await subject.close()


def test_targets_of_a_dead_process_are_dropped() -> None:
    class Many(FakeHandle):
        made = 0

        def options(self, **options: Any) -> Any:
            Many.made += 1
            return options["multiplexed_model_id"]

    handles: Any = {"gguf": Many()}
    targets = Targets(handles, has_many=True)
    scheduler: Any = FakeHandle()
    states = ModelStatesWatch(scheduler)
    one, two = residency("a"), replace(residency("a"), model_id="two")
    for each in (one, two):
        states.note_loaded(each)
        assert str(targets.at(each)) == "a"
    assert Many.made == 1
    for each in states.note_died(one):
        targets.forget(each)
    assert states.residencies == {}
    assert str(targets.at(one)) == "a"
    assert Many.made == 2


async def test_a_request_goes_to_the_process_it_was_meant_for(receiver: FrameReceiver) -> None:
    far = Residency("m", "gguf", "b", "node", 2048, 0.1)
    replica = FakeHandle(generate=sending(([END], None)))
    subject = dispatcher(receiver, FakeHandle(ensure_loaded=answering(far)), replica)
    await collect(subject)
    assert attempts_of(replica) == [Attempt("r.0", "b")]
    await subject.close()
