"""Asks Serve's controller which deployments have a running replica, and which replicas exist."""

import asyncio
from typing import Any

import ray
from ray.exceptions import RayError

from core.errors import Unavailable
from core.supervision import call_in_thread

# `ray.serve._private.constants`; Serve has no public name for them.
_CONTROLLER, _NAMESPACE = "SERVE_CONTROLLER_ACTOR", "serve"
_LIMIT_S = 5.0


def own_node_id() -> str:
    """Return the id of this process's node in the cluster; empty outside of a cluster."""
    return ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""


async def running_deployments() -> frozenset[str]:
    """Return the names of the deployments that have a running replica now.

    A call to a deployment scaled to zero would start it; ask this first.  Raises Unavailable if
    Serve's controller does not answer within 5 s.

    Source: what `serve.status()` reads.  That function checks the whole answer against its
    schema, 75 ms of CPU per call instead of 1.5 ms; this is asked every few seconds.
    """
    return _running(await _details())


async def existing_replicas() -> frozenset[str]:
    """Return the ids of all replicas that exist, in whatever state.  Raises as the above."""
    return _replicas(await _details())


async def _details() -> dict[str, Any]:
    try:
        async with asyncio.timeout(_LIMIT_S):
            # It blocks without a limit while Ray's GCS is away.
            controller = await call_in_thread("impetus-controller", _controller)
            details: dict[str, Any] = await controller.get_serve_instance_details.remote()
    except (TimeoutError, ValueError, RayError) as problem:
        raise Unavailable(
            "Ray Serve's controller does not answer; try again later.", retry_after_s=5
        ) from problem
    return details


def _controller() -> Any:
    return ray.get_actor(_CONTROLLER, namespace=_NAMESPACE)


def _replicas(details: dict[str, Any]) -> frozenset[str]:
    return frozenset(
        replica["replica_id"]
        for application in details["applications"].values()
        for deployment in application["deployments"].values()
        for replica in deployment["replicas"]
    )


def _running(details: dict[str, Any]) -> frozenset[str]:
    """Parse the names from the answer, which has the schema of Serve's REST API."""
    return frozenset(
        name
        for application in details["applications"].values()
        for name, deployment in application["deployments"].items()
        if any(replica["state"] == "RUNNING" for replica in deployment["replicas"])
    )
