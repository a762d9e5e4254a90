"""What a request is told of its way: waits, the load, whom it cost, engines that were lost."""

from types import SimpleNamespace

import pytest

from core.errors import EngineFailed, ModelNotResident
from core.types import (
    Finished,
    GenerationRequest,
    PrefillProgress,
    TextDelta,
    TextPrompt,
    Timing,
    Usage,
)
from deployments.messages import Residency
from deployments.router.attempts import RequestAttempts

REQUEST = GenerationRequest("r", "m", TextPrompt("hi"))
DIED = EngineFailed("it died")


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(
        "deployments.router.attempts.time", SimpleNamespace(monotonic=clock.monotonic)
    )
    return clock


def residency(load_s: float, *evicted: str) -> Residency:
    return Residency("m", "gguf", "a", "node", 2048, load_s, evicted)


def timing_of(attempts: RequestAttempts, last: Timing) -> Timing:
    attempts.on_events([Finished("stop", Usage(1, 1), last)])
    assert attempts.finished is not None
    return attempts.finished.timing


def test_a_resident_models_request_has_the_engines_own_timing() -> None:
    attempts = RequestAttempts(REQUEST, lambda _: None)
    attempts.begin()
    last = Timing(0.1, 0.2, 0.3, throttled_s=0.05)
    assert timing_of(attempts, last) == last


def test_a_wait_is_split_into_memory_and_load() -> None:
    attempts = RequestAttempts(REQUEST, lambda _: None)
    attempts.note_wait(5.0, residency(2.0, "b", "c"))
    timing = timing_of(attempts, Timing(queued_s=1.0))
    assert (timing.queued_s, timing.load_s, timing.evicted) == (4.0, 2.0, ("b", "c"))
    late = RequestAttempts(REQUEST, lambda _: None)
    late.note_wait(0.5, residency(2.0))
    assert timing_of(late, Timing()).load_s == 0.5


def test_a_lost_engines_work_counts(clock: Clock) -> None:
    attempts = RequestAttempts(REQUEST, lambda _: None)
    attempts.begin()
    clock.now += 1.0
    attempts.on_events([PrefillProgress(1, 2)])
    clock.now += 1.0
    attempts.on_events([TextDelta("a", (1,))])
    clock.now += 3.0
    attempts.note_lost(DIED)
    clock.now += 9.0
    attempts.note_lost(DIED)
    attempts.begin()
    timing = timing_of(attempts, Timing(0.0, 0.5, 0.25))
    assert (timing.prefill_s, timing.decode_s, timing.resumed) == (2.5, 3.25, 2)


def test_a_model_that_was_elsewhere_is_no_lost_engine(clock: Clock) -> None:
    attempts = RequestAttempts(REQUEST, lambda _: None)
    attempts.begin()
    clock.now += 1.0
    attempts.note_lost(ModelNotResident("not here"))
    assert timing_of(attempts, Timing()) == Timing()


def test_a_load_that_died_is_counted_without_work() -> None:
    attempts = RequestAttempts(REQUEST, lambda _: None)
    attempts.note_lost(DIED)
    assert timing_of(attempts, Timing()) == Timing(resumed=1)


def test_each_attempt_asks_for_what_is_left() -> None:
    attempts = RequestAttempts(REQUEST, lambda _: None)
    assert attempts.remaining_request("r.0").id == "r.0"
    assert not attempts.remaining_request("r.0").generated
    attempts.on_events([TextDelta("a", (1, 2))])
    assert (attempts.remaining_request("r.1").id, attempts.remaining_request("r.1").generated) == (
        "r.1",
        (1, 2),
    )
    assert attempts.can_resume
