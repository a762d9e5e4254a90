"""The router's health check, which Serve calls: it fails for a deaf listener and a failing task."""

from typing import Any

import pytest
from ray import serve
from ray.serve._private.constants import HEALTH_CHECK_METHOD

from core.errors import Unavailable
from core.supervision import RestartPolicy, Supervisor
from deployments.router.deployment import RouterReplica
from deployments.scheduler.deployment import SchedulerReplica
from tests.waiting import wait_until


class UnservedRouter(RouterReplica):
    """A router without its parts; Serve awaits the coroutine that `__del__` is."""

    # Serve awaits a constructor that is a coroutine.
    def __init__(self, supervisor: Supervisor, listener: Any) -> None:
        self._supervisor = supervisor
        self._listener = listener

    def __del__(self) -> None:  # type: ignore[override]
        pass


class Listener:
    """A listener that answers or does not."""

    def __init__(self) -> None:
        self.problem: Exception | None = None

    async def check_answers(self) -> None:
        if self.problem is not None:
            raise self.problem


async def test_a_deaf_listener_and_a_failing_task_fail_the_health_check() -> None:
    supervisor = Supervisor(RestartPolicy(0.001, 0.001, most_failures=1, least_s=0.0))
    listener = Listener()
    router = UnservedRouter(supervisor, listener)
    await router.check_health()
    listener.problem = Unavailable("The HTTP listener did not answer its own request.")
    with pytest.raises(Unavailable, match="did not answer"):
        await router.check_health()
    listener.problem = None

    async def fails() -> None:
        raise OSError("address in use")

    supervisor.keep_running("HTTP listener", fails)
    await wait_until(lambda: supervisor.parts()[0].status == "failing", "the task keeps failing")
    with pytest.raises(Unavailable, match="HTTP listener: OSError: address in use"):
        await router.check_health()
    await supervisor.stop()


@pytest.mark.parametrize("deployed", [RouterReplica, SchedulerReplica])
def test_serve_finds_the_health_check(deployed: Any) -> None:
    ingress: Any = serve.ingress()(deployed) if deployed is RouterReplica else deployed
    assert callable(getattr(ingress, HEALTH_CHECK_METHOD))
