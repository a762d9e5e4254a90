"""Fixtures of a scheduler over a stand-in replica."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from deployments.scheduler.deployment import SchedulerReplica
from tests.unit.deployments.scheduler.scheduling import InProcess, Replica, started


@pytest.fixture
def inspection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.scheduler.scanning.Inspector", InProcess)


@pytest.fixture
def replica() -> Replica:
    return Replica()


@pytest.fixture
async def scheduler(tmp_path: Path, replica: Replica) -> AsyncIterator[SchedulerReplica]:
    async with started(tmp_path, replica) as scheduler:
        yield scheduler
