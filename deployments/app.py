"""The composition root: `serve_config.yaml` names `build` as the application."""

from collections.abc import Callable
from typing import Any

from ray import serve
from ray.serve import Application, Deployment

from backends.registry import backends_for
from core.settings import Settings
from deployments.engine import FormatReplica
from deployments.router import RouterReplica
from deployments.scheduler import SchedulerReplica

# The engine's own queue bounds the requests; Serve's limit is only the outer stop.
_MOST_ONGOING = 2048

# Formats that start on demand go when idle for as long as Ollama keeps a model.
_ON_DEMAND = {
    "min_replicas": 0,
    "initial_replicas": 0,
    "max_replicas": 1,
    "upscale_delay_s": 0,
    "downscale_delay_s": 300,
}


def build(settings: Settings) -> Application:
    """Bind one deployment per format, the scheduler over them, and the router over all."""
    formats = {name: _format(name) for name in settings.formats}
    scheduler = _deployment(SchedulerReplica, "scheduler").bind(settings, formats)
    router = _deployment(serve.ingress()(RouterReplica), "router")
    return router.bind(settings, scheduler, formats)


def _format(name: str) -> Application:
    on_demand = backends_for([name])[name].starts_on_demand
    scaling = {"autoscaling_config": _ON_DEMAND} if on_demand else {"num_replicas": 1}
    return _deployment(FormatReplica, name, **scaling).bind(name)


def _deployment(cls: Any, name: str, **options: Any) -> Deployment:
    decorate: Callable[[Any], Deployment] = serve.deployment(
        name=name,
        max_ongoing_requests=_MOST_ONGOING,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=20.0,
        # How soon a dead replica is noticed and replaced; Serve's default is 10 s.
        health_check_period_s=2.0,
        **options,
    )
    return decorate(cls)
