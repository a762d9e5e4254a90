"""Which deployments have a running replica, asked of Serve's controller."""

import asyncio
from typing import Any

import ray

# `ray.serve._private.constants`; Serve has no public name for them.
_CONTROLLER, _NAMESPACE = "SERVE_CONTROLLER_ACTOR", "serve"


def own_node_id() -> str:
    """Return the id of this process' machine in the cluster; empty outside of one."""
    return ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""


async def running_deployments() -> frozenset[str]:
    """Return the names of the deployments that have a running replica now.

    A call to a deployment without one would start it, so formats that scale to zero are asked
    only after this.  Raises ValueError where Serve does not run.

    Source: what `serve.status()` reads.  That function checks the whole answer against its
    schema, 75 ms of CPU a call where reading it takes 1.5; this is asked every few seconds.
    """
    controller = await asyncio.to_thread(ray.get_actor, _CONTROLLER, namespace=_NAMESPACE)
    return _running(await controller.get_serve_instance_details.remote())


def _running(details: dict[str, Any]) -> frozenset[str]:
    """Return the names from the answer, which has the schema of Serve's REST API."""
    return frozenset(
        name
        for application in details["applications"].values()
        for name, deployment in application["deployments"].items()
        if any(replica["state"] == "RUNNING" for replica in deployment["replicas"])
    )
