"""Which deployments run, read from the answer of Serve's controller."""

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError
from ray.serve.schema import ServeInstanceDetails

from core.errors import Unavailable
from deployments.serve import status as liveness


def details(*states: str) -> dict[str, Any]:
    deployment = {"name": "gguf", "replicas": [{"state": state} for state in states]}
    return {"applications": {"impetus": {"deployments": {"gguf": deployment}}}}


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ((), frozenset()),
        (("STARTING",), frozenset()),
        (("STOPPING", "STARTING"), frozenset()),
        (("RUNNING",), {"gguf"}),
        (("STOPPING", "RUNNING"), {"gguf"}),
    ],
)
async def test_only_what_has_a_running_replica_runs(
    monkeypatch: pytest.MonkeyPatch, states: tuple[str, ...], expected: frozenset[str]
) -> None:
    async def answer() -> dict[str, Any]:
        return details(*states)

    controller = SimpleNamespace(get_serve_instance_details=SimpleNamespace(remote=answer))
    monkeypatch.setattr(ray, "get_actor", lambda *_, **__: controller)
    assert await liveness.running_deployments() == expected


async def test_replicas_exist_in_any_state(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer() -> dict[str, Any]:
        found = details("RUNNING", "STOPPING", "STARTING")
        replicas = found["applications"]["impetus"]["deployments"]["gguf"]["replicas"]
        for number, replica in enumerate(replicas):
            replica["replica_id"] = f"r{number}"
        return found

    controller = SimpleNamespace(get_serve_instance_details=SimpleNamespace(remote=answer))
    monkeypatch.setattr(ray, "get_actor", lambda *_, **__: controller)
    found = await liveness.existing_replicas()
    assert found is not None
    assert sorted(found) == ["r0", "r1", "r2"]


async def hang() -> dict[str, Any]:
    await asyncio.Event().wait()
    return {}


async def die() -> dict[str, Any]:
    raise RayActorError


@pytest.mark.parametrize("answer", [hang, die])
async def test_a_controller_that_does_not_answer_is_told_in_time(
    monkeypatch: pytest.MonkeyPatch, answer: Any
) -> None:
    monkeypatch.setattr(liveness, "_LIMIT_S", 0.05)
    controller = SimpleNamespace(get_serve_instance_details=SimpleNamespace(remote=answer))
    monkeypatch.setattr(ray, "get_actor", lambda *_, **__: controller)
    with pytest.raises(Unavailable, match="controller") as caught:
        await liveness.running_deployments()
    assert caught.value.retry_after_s


async def test_a_controller_that_cannot_be_found_blocks_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(liveness, "_LIMIT_S", 0.05)
    gate = threading.Event()

    def blocked(*_: object, **__: object) -> None:
        gate.wait(30)
        raise ValueError("no such actor")

    monkeypatch.setattr(ray, "get_actor", blocked)
    with pytest.raises(Unavailable):
        await liveness.running_deployments()
    # It took no thread of the pool that everything else uses.
    assert await asyncio.wait_for(asyncio.to_thread(gate.is_set), 20) is False
    gate.set()
    with pytest.raises(Unavailable):
        await liveness.running_deployments()


def test_the_fields_read_are_those_of_serves_own_schema() -> None:
    applications = ServeInstanceDetails.model_fields["applications"].annotation
    (_, application) = applications.__args__  # type: ignore[union-attr]
    (_, deployment) = application.model_fields["deployments"].annotation.__args__
    (replica,) = deployment.model_fields["replicas"].annotation.__args__
    assert replica.model_fields["state"].annotation("RUNNING") == "RUNNING"
    assert replica.model_fields["replica_id"].annotation is str
