"""Several replicas of a format: a request finds its model, an order finds them all."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.exceptions import DeploymentUnavailableError

from backends.base import EngineLoad
from core.settings import Settings
from deployments.messages import (
    ModelUsage,
    ProcessReport,
    ReplicaReport,
    Residency,
    SchedulerSnapshot,
    UnloadResult,
)
from deployments.router.targets import Targets
from deployments.router.telemetry import ReplicaTelemetry
from deployments.serve.affinity import ResidencyRouter
from deployments.serve.broadcast import broadcast_handles
from deployments.serve.handles import call
from tests.unit.deployments.handles import FakeHandle, answering


def residency(model_id: str, replica_id: str) -> Residency:
    return Residency(model_id, "echo", replica_id, "node", 2048, 0.1)


class ManyHandle:
    """A handle whose replicas answer a broadcast with what the test gives them."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.calls: list[tuple[Any, ...]] = []
        self.targets: list[str] = []
        self.load_model = object()

    def options(self, **options: Any) -> "ManyHandle":
        if target := options.get("multiplexed_model_id"):
            self.targets.append(target)
        return self

    def broadcast(self, method: str, *arguments: Any) -> Any:
        self.calls.append((method, *arguments))
        answer = self.answers.pop(0)

        async def results_async() -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer

        return SimpleNamespace(results_async=results_async)


def reached(handle: ManyHandle) -> Any:
    handles: Any = {"echo": handle}
    return broadcast_handles(handles, Settings(max_replicas=2))["echo"]


def test_one_replica_is_reached_by_the_handle_itself() -> None:
    handle: Any = ManyHandle()
    handles: dict[str, Any] = {"echo": handle}
    assert broadcast_handles(handles, Settings()) is handles
    found: Any = Targets(handles, has_many=False).at(residency("m", "a"))
    assert found is handle
    assert handle.targets == []


def test_a_replicas_handle_is_made_once_and_goes_with_it() -> None:
    handle = ManyHandle()
    handles: Any = {"echo": handle}
    targets = Targets(handles, has_many=True)
    for _ in range(3):
        targets.at(residency("m", "a"))
        targets.at(residency("n", "b"))
    assert handle.targets == ["a", "b"]
    targets.forget(residency("m", "a"))
    targets.at(residency("m", "a"))
    assert handle.targets == ["a", "b", "a"]


async def test_answers_of_all_replicas_are_one() -> None:
    a, b = residency("m", "a"), residency("n", "b")
    reports = [
        ReplicaReport(
            "echo",
            pid,
            (ModelUsage(name, 0.0, 1, EngineLoad()),),
            (ProcessReport(replica, 0, ""),),
        )
        for pid, name, replica in ((1, "m", "a"), (2, "n", "b"))
    ]
    freed = UnloadResult(returned_bytes=5, held_bytes=5)
    handle = ManyHandle([[a], [b]], reports, [None, freed], [None, None])
    every = reached(handle)
    assert await call(every.residencies.remote()) == [a, b]
    report = await call(every.report.remote())
    assert [resident.model_id for resident in report.residents] == ["m", "n"]
    assert [one.replica_id for one in report.processes] == ["a", "b"]
    assert await call(every.unload_model.remote("m")) is freed
    assert await call(every.set_limits.remote("limits")) is None
    assert handle.calls[2:] == [("unload_model", "m"), ("set_limits", "limits")]
    assert every.load_model is handle.load_model


async def test_metrics_are_asked_of_all_replicas() -> None:
    handle = ManyHandle([ReplicaReport("echo", 7, ())])

    async def echo_runs() -> frozenset[str]:
        return frozenset({"echo"})

    scheduler: Any = FakeHandle(snapshot=answering(SchedulerSnapshot()))
    formats = {"echo": reached(handle)}
    telemetry = ReplicaTelemetry(formats, lambda: frozenset({"echo"}), scheduler, echo_runs)
    await telemetry.refresh()
    assert handle.calls == [("report",)]


async def test_a_question_waits_for_the_first_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.serve.broadcast._POLL_S", 0)
    unknown = DeploymentUnavailableError.__new__(DeploymentUnavailableError)
    assert await call(reached(ManyHandle(unknown, unknown, [[]])).residencies.remote()) == []


async def test_a_question_is_given_up_with_its_caller() -> None:
    handle = ManyHandle(DeploymentUnavailableError.__new__(DeploymentUnavailableError))
    work = asyncio.ensure_future(call(reached(handle).residencies.remote()))
    while not handle.calls:
        await asyncio.sleep(0)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work


def routed(router: ResidencyRouter, replicas: list[Any], target: str) -> str:
    pending: Any = SimpleNamespace(metadata=SimpleNamespace(multiplexed_model_id=target))
    ((chosen,),) = asyncio.run(router.choose_replicas(replicas, pending))
    found: str = chosen.replica_id.unique_id
    return found


def test_requests_go_to_their_replica_and_loads_go_round() -> None:
    router = ResidencyRouter.__new__(ResidencyRouter)
    router.initialize_state()
    replicas: list[Any] = [SimpleNamespace(replica_id=_Id(name)) for name in ("a", "b", "c")]
    assert [routed(router, replicas, name) for name in ("b", "b", "c")] == ["b", "b", "c"]
    assert [routed(router, replicas, "") for _ in range(4)] == ["a", "b", "c", "a"]
    assert routed(router, replicas, "gone") in ("a", "b", "c")
    assert asyncio.run(router.choose_replicas([], None)) == []


class _Id:
    """A replica's id."""

    def __init__(self, unique_id: str) -> None:
        self.unique_id = unique_id
