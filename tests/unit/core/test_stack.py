"""Tests of calls on a thread with a large stack."""

import os
import sys
import threading

import pytest

from core.errors import Unavailable
from core.stack import call_with_stack
from core.units import MIB


def test_the_result_and_any_exception_reach_the_caller() -> None:
    class Panic(BaseException):
        pass

    def panic() -> None:
        raise Panic

    assert call_with_stack(16 * MIB, lambda: 7) == 7
    with pytest.raises(Panic):
        call_with_stack(16 * MIB, panic)


def test_the_thread_has_the_large_stack_and_later_ones_the_usual(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual = threading.stack_size()
    sizes: list[int] = []
    start = threading.Thread.start

    def record(thread: threading.Thread) -> None:
        sizes.append(threading.stack_size())
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", record)
    assert call_with_stack(64 * MIB, lambda: 7) == 7
    threading.Thread(target=lambda: None).start()
    assert sizes == [64 * MIB, usual]
    assert threading.stack_size() == usual


def test_a_machine_without_threads_left_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(Unavailable, match="no memory or threads"):
        call_with_stack(16 * MIB, lambda: 7)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the priority of a Linux thread")
def test_work_in_the_background_has_a_lower_priority_and_only_its_thread() -> None:
    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    usual = priority()
    assert call_with_stack(16 * MIB, priority, is_background=True) >= min(usual + 1, 10)
    assert call_with_stack(16 * MIB, priority) == priority() == usual
