"""Which deployments run, read from the answer of Serve's controller."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.serve.schema import ServeInstanceDetails

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


def test_the_fields_read_are_those_of_serves_own_schema() -> None:
    applications = ServeInstanceDetails.model_fields["applications"].annotation
    (_, application) = applications.__args__  # type: ignore[union-attr]
    (_, deployment) = application.model_fields["deployments"].annotation.__args__
    (replica,) = deployment.model_fields["replicas"].annotation.__args__
    assert replica.model_fields["state"].annotation("RUNNING") == "RUNNING"
    assert replica.model_fields["replica_id"].annotation is str
