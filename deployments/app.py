"""Builds the Ray Serve application (composition root; `serve_config.yaml` names `build`)."""

from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray import serve
from ray.serve import Application, Deployment
from ray.serve.exceptions import RayServeException

from backends.base import Backend
from backends.registry import backends_for
from core.errors import ImpetusError
from core.settings import Settings
from deployments.jobs.deployment import JobsReplica
from deployments.options import check_home, check_settings
from deployments.replica.deployment import FormatReplica
from deployments.router.deployment import RouterReplica
from deployments.scheduler.deployment import SchedulerReplica
from deployments.serve.affinity import ResidencyRouter
from deployments.serve.authentication import check_authentication
from deployments.serve.guard import guard_unguarded
from deployments.serve.message_size import runtime_env_options
from deployments.serve.resources import reservation
from deployments.stored_settings import load_with_stored

# The engine's queue bounds the requests; Serve's limit is only a safety net.
_MOST_ONGOING = 2048

# `deployments.serve.autoscaling` decides; a decrease has to hold for 10 s.
_SCALING: Mapping[str, Any] = {
    "upscale_delay_s": 0,
    "downscale_delay_s": 10,
    "look_back_period_s": 20,
    # The engine batches: one process serves far more than a few requests at a time.
    "target_ongoing_requests": 16,
}


def build(arguments: dict[str, Any]) -> Application:
    """Bind one deployment per format, the scheduler over them, long jobs, the router over all.

    Raises RayServeException with a sentence if the server must not start: Ray Serve shows the
    message of that class alone, and a traceback with any other.
    """
    try:
        return _build(load_with_stored(arguments))
    except ImpetusError as problem:
        raise RayServeException(problem.message) from None


def _build(settings: Settings) -> Application:
    check_settings(settings)
    check_home(settings)
    check_authentication()
    guard_unguarded()
    backends = backends_for(settings.formats)
    cluster = ray.cluster_resources()  # type: ignore[no-untyped-call]
    sizes = [backend.process_bytes for backend in backends.values()]
    formats = {
        name: _format(backend, settings, reservation(backend.process_bytes, cluster, sizes))
        for name, backend in backends.items()
    }
    common = runtime_env_options(settings)
    scheduler = _deployment(SchedulerReplica, "scheduler", common).bind(settings, formats)
    # Long jobs are owned by one process, whose SQLite file has one writer.
    jobs = _deployment(JobsReplica, "jobs", common, num_replicas=1).bind(settings, scheduler)
    router = _deployment(serve.ingress()(RouterReplica), "router", common)
    return router.bind(settings, scheduler, formats, jobs)


def _format(backend: Backend, settings: Settings, reserved: dict[str, Any]) -> Application:
    options = format_options(backend, settings)
    actor_options = {**reserved, **runtime_env_options(settings)}
    deployment = _deployment(FormatReplica, backend.name, actor_options, **options)
    return deployment.bind(backend.name, settings)


def format_options(backend: Backend, settings: Settings) -> dict[str, Any]:
    """Return a format's Serve options: number of replicas, and the router of its requests."""
    options: dict[str, Any] = {}
    if settings.max_replicas > 1:
        options["request_router_config"] = {
            "request_router_class": ResidencyRouter,
            "initial_backoff_s": 0.005,
            "max_backoff_s": 0.05,
        }
    elif not backend.starts_on_demand:
        return {"num_replicas": 1}
    least = 0 if backend.starts_on_demand else 1
    scaling = {"min_replicas": least, "initial_replicas": least}
    most = {"max_replicas": settings.max_replicas}
    return {**options, "autoscaling_config": {**_SCALING, **scaling, **most}}


def _deployment(
    cls: Any, name: str, actor_options: Mapping[str, Any], **options: Any
) -> Deployment:
    decorate: Callable[[Any], Deployment] = serve.deployment(
        name=name,
        max_ongoing_requests=_MOST_ONGOING,
        ray_actor_options={"num_cpus": 0, **actor_options},
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=20.0,
        # How soon a dead replica is detected and replaced; Serve's default is 10 s.
        health_check_period_s=2.0,
        # A process that hangs as a whole fails three of these in a row; the default is 30 s.
        health_check_timeout_s=10.0,
        **options,
    )
    return decorate(cls)
