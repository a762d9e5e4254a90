"""Equal grammars that arrive together are tried once."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from backends.cancellation import Cancelled, cancelled_by
from backends.grammar.trial import Verdict
from backends.grammar.verdicts import Verdicts
from backends.watch import StepWatch
from core.errors import Unavailable

_LIMIT_S = 60


class Trials:
    """Trials that last until they are released, each with an outcome of its own."""

    def __init__(self, *outcomes: Verdict | BaseException) -> None:
        self.left = list(outcomes)
        self.started = threading.Semaphore(0)
        self.release = threading.Event()

    def __call__(self) -> Verdict:
        outcome = self.left.pop(0)
        self.started.release()
        assert self.release.wait(_LIMIT_S)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def begun(
    pool: ThreadPoolExecutor, verdicts: Verdicts, trials: Trials, count: int
) -> list[Future[Verdict]]:
    """Start a trial, and then other threads that want the same; return their results."""
    found = [pool.submit(verdicts.get, b"key", trials)]
    assert trials.started.acquire(timeout=_LIMIT_S)
    return found + [pool.submit(verdicts.get, b"key", trials) for _ in range(count - 1)]


def test_a_grammar_is_tried_once_for_all_who_want_it(pool: ThreadPoolExecutor) -> None:
    verdicts, trials = Verdicts(), Trials(Verdict("refused"))
    found = begun(pool, verdicts, trials, 12)
    trials.release.set()
    assert {each.result(_LIMIT_S) for each in found} == {Verdict("refused")}
    assert verdicts.get(b"key", trials) == Verdict("refused")
    assert not verdicts._trying


def test_other_grammars_do_not_wait(pool: ThreadPoolExecutor) -> None:
    verdicts, trials = Verdicts(), Trials(Verdict("refused"))
    found = begun(pool, verdicts, trials, 1)
    assert verdicts.get(b"other", lambda: Verdict("")) == Verdict("")
    trials.release.set()
    assert found[0].result(_LIMIT_S).refusal


def test_a_trial_that_did_not_succeed_is_not_remembered(pool: ThreadPoolExecutor) -> None:
    verdicts, trials = Verdicts(), Trials(Unavailable("busy"), Verdict("now"), Verdict("never"))
    found = begun(pool, verdicts, trials, 1)
    trials.release.set()
    with pytest.raises(Unavailable):
        found[0].result(_LIMIT_S)
    assert verdicts.get(b"key", trials) == verdicts.get(b"key", trials) == Verdict("now")


def test_when_who_tries_it_is_cancelled_another_one_tries_it(pool: ThreadPoolExecutor) -> None:
    verdicts, trials = Verdicts(), Trials(Cancelled(), Verdict("refused"))
    first, *others = begun(pool, verdicts, trials, 6)
    trials.release.set()
    with pytest.raises(Cancelled):
        first.result(_LIMIT_S)
    assert {each.result(_LIMIT_S) for each in others} == {Verdict("refused")}


def test_waiting_ends_with_the_request_and_does_not_count_as_hung(
    pool: ThreadPoolExecutor,
) -> None:
    verdicts, trials, watch = Verdicts(), Trials(Verdict("")), StepWatch()
    begun(pool, verdicts, trials, 1)
    gone, is_watched = threading.Event(), threading.Event()

    def wait() -> Verdict:
        with cancelled_by(gone), watch.running("prepare"):
            assert watch.lasted_s
            is_watched.set()
            return verdicts.get(b"key", trials)

    waiting = pool.submit(wait)
    try:
        assert is_watched.wait(_LIMIT_S)
        while watch.lasted_s:
            assert not waiting.done()
            time.sleep(0.001)
        gone.set()
        assert isinstance(waiting.exception(_LIMIT_S), Cancelled)
    finally:
        trials.release.set()
