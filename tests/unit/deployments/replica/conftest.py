"""A format's replica outside of Serve."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from core.settings import Settings
from deployments.replica.deployment import FormatReplica


class UnservedReplica(FormatReplica):
    """Serve awaits the coroutine that `__del__` is; the interpreter cannot."""

    def __del__(self) -> None:  # type: ignore[override]
        pass


@pytest.fixture
def replica(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FormatReplica]:
    context: Any = SimpleNamespace(
        replica_id=SimpleNamespace(unique_id="replica"), get_node_id=lambda: "node"
    )
    monkeypatch.setattr("deployments.replica.deployment.prepare_worker", lambda: None)
    monkeypatch.setattr("deployments.replica.deployment.serve.get_replica_context", lambda: context)
    monkeypatch.setattr("deployments.replica.deployment.ray.get_runtime_context", lambda: context)
    monkeypatch.setattr("deployments.activity._SHARED_MEMORY", tmp_path / "none")
    replica = UnservedReplica("echo", Settings(home=tmp_path, prefix_ram=0, prefix_disk=0))
    yield replica
    replica._activity.close()
