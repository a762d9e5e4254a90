"""Readiness: true only when every part answers, with the reason otherwise."""

import asyncio
from typing import Any

import pytest

from core.errors import EngineFailed, ImpetusError, Unavailable
from deployments.messages import ModelStates
from deployments.router import readiness as readiness_module
from deployments.router.model_states import ModelStatesWatch
from deployments.router.readiness import Readiness
from deployments.start import readiness as launcher_readiness
from tests.unit.deployments.handles import FakeHandle, answering


def readiness(answer: Any, *checks: Any, now: list[float] | None = None) -> Readiness:
    times = now or [0.0]

    def clock() -> float:
        # Each question is asked anew unless a test holds the clock.
        if now is None:
            times[0] += 10
        return times[0]

    handle: Any = FakeHandle(not_ready_because=answer)
    return Readiness(handle, checks, clock=clock)


async def hang(*arguments: Any) -> Any:
    del arguments
    await asyncio.Event().wait()


async def test_it_is_ready_when_all_parts_are() -> None:
    assert await readiness(answering(""), lambda: "").not_ready_because() == ""


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (hang, "did not answer within"),
        (answering("The model folders are being scanned."), "being scanned"),
        (answering(EngineFailed("its process died")), "its process died"),
        (answering(RuntimeError("no controller")), "RuntimeError"),
    ],
)
async def test_a_scheduler_that_does_not_answer_is_told_and_then_forgotten(
    answer: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_s = 0.01 if answer is hang else 30.0
    monkeypatch.setattr(readiness_module, "_ASK_LIMIT_S", limit_s)
    subject = readiness(answer)
    assert reason in await subject.not_ready_because()
    monkeypatch.setattr(readiness_module, "_ASK_LIMIT_S", 30.0)
    subject._scheduler = FakeHandle(not_ready_because=answering(""))  # type: ignore[assignment]
    assert await subject.not_ready_because() == ""
    # Having been ready once is not enough.
    monkeypatch.setattr(readiness_module, "_ASK_LIMIT_S", limit_s)
    subject._scheduler = FakeHandle(not_ready_because=answer)  # type: ignore[assignment]
    assert reason in await subject.not_ready_because()


def raising(problem: Exception) -> Any:
    def check() -> str:
        raise problem

    return check


@pytest.mark.parametrize(
    ("check", "reason"),
    [
        (lambda: "The HTTP listener does not work.", "HTTP listener"),
        (raising(ImpetusError("The catalog could not be read.")), "catalog could not be read"),
        (raising(ValueError("a bug")), "ValueError"),
    ],
)
async def test_a_local_part_that_does_not_work_is_told(check: Any, reason: str) -> None:
    assert reason in await readiness(answering(""), lambda: "", check).not_ready_because()


async def test_a_flood_of_questions_asks_the_scheduler_once() -> None:
    handle: Any = FakeHandle(not_ready_because=answering(""))
    subject = Readiness(handle, (), clock=lambda: 7.0)
    await asyncio.gather(*(subject.not_ready_because() for _ in range(100)))
    assert len(handle.not_ready_because.calls) == 1


async def test_model_states_are_outdated_when_the_scheduler_is_silent() -> None:
    handle: Any = FakeHandle(model_states=answering(ModelStates(version=1), Unavailable("away")))
    watch = ModelStatesWatch(handle)
    assert "not published" in watch.problem()
    await watch.refresh()
    assert watch.problem() == ""
    assert watch._answered_at is not None
    watch._answered_at -= 60
    await watch.refresh()
    assert "for 60 s" in watch.problem()


async def test_states_that_were_not_published_yet_are_asked_for() -> None:
    asked = answering(ModelStates(), ModelStates(version=1))
    handle: Any = FakeHandle(model_states=asked, not_ready_because=answering(""))
    watch = ModelStatesWatch(handle)
    times = iter(range(10, 1000, 10))
    subject = Readiness(handle, (), watch, clock=lambda: float(next(times)))
    # Version -1: the scheduler does not know yet what is resident.
    assert "not published" in await subject.not_ready_because()
    assert await subject.not_ready_because() == ""
    assert await subject.not_ready_because() == ""
    assert len(handle.model_states.calls) == 2


async def test_a_scheduler_that_hangs_is_told_within_the_launchers_patience() -> None:
    limits = readiness_module._ASK_LIMIT_S + readiness_module._REFRESH_LIMIT_S
    assert limits < launcher_readiness._ANSWER_LIMIT_S
