"""Which deployments have a running replica, asked of Serve's controller."""

import asyncio
import logging

import ray
from ray import serve

logger = logging.getLogger(__name__)


def own_node_id() -> str:
    """Return the id of this process' machine in the cluster; empty outside of one."""
    return ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""


async def running_deployments() -> frozenset[str]:
    """Return the names of the deployments that have a running replica now.

    A call to a deployment without one would start it, so formats that scale to zero are asked
    only after this.  Source: `serve.status()`, whose states are text for a known enum.
    """
    status = await asyncio.to_thread(serve.status)
    return frozenset(
        name
        for application in status.applications.values()
        for name, deployment in application.deployments.items()
        if any(
            str(getattr(state, "value", state)) == "RUNNING" and count
            for state, count in deployment.replica_states.items()
        )
    )
