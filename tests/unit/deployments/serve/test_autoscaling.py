"""The policy as Serve's controller calls it, and what Serve is told of the formats."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ray import cloudpickle
from ray.serve.schema import ServeDeploySchema

from backends.echo import EchoBackend
from backends.gguf.backend import GgufBackend
from core.settings import Settings
from core.units import GIB, MIB
from deployments.app import format_options
from deployments.serve import autoscaling
from deployments.serve.affinity import ResidencyRouter
from deployments.serve.autoscaling import FormatPolicy
from deployments.serve.resources import reservation
from deployments.start.environment import ROOT
from scheduler.scaling import ScalingDirective


@dataclass(frozen=True)
class Deployment:
    """Serve's name for one deployment."""

    name: str


def context(requests: float, replicas: int, least: int = 0, most: int = 1) -> Any:
    return SimpleNamespace(
        total_num_requests=requests,
        target_num_replicas=replicas,
        capacity_adjusted_min_replicas=least,
        capacity_adjusted_max_replicas=most,
        config=SimpleNamespace(get_target_ongoing_requests=lambda: 16.0),
    )


@dataclass
class Source:
    """Where the policy reads; counts how often."""

    directive: ScalingDirective = field(default_factory=ScalingDirective)
    reads: int = 0
    now: float = 0.0

    def read(self) -> ScalingDirective:
        self.reads += 1
        return self.directive


def test_the_policy_answers_for_every_format_and_keeps_to_the_directive() -> None:
    source = Source(ScalingDirective(admits=False, finished=("done",)))
    policy = FormatPolicy(source.read, lambda: source.now)
    cold, done, used = map(Deployment, ("cold", "done", "used"))
    contexts = {cold: context(3, 0), done: context(0, 1), used: context(3, 1)}
    # A deployment that may not start is left out: for any number Serve would start one.
    assert policy(contexts) == ({done: 0, used: 1}, {})


def test_the_directive_is_read_once_a_second() -> None:
    source = Source()
    policy = FormatPolicy(source.read, lambda: source.now)
    for now in (0.0, 0.3, 0.9, 1.0, 1.5):
        source.now = now
        policy({})
    assert source.reads == 2


def test_a_policy_that_fails_changes_nothing_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    policy = FormatPolicy(ScalingDirective)
    for _ in range(3):
        assert policy({Deployment("f"): "not a context"}) == ({}, {})
    assert caplog.text.count("autoscaling failed") == 1


def test_the_policy_travels_by_value() -> None:
    pickler: Any = cloudpickle
    pickler.register_pickle_by_value(autoscaling)
    try:
        data = pickler.dumps(FormatPolicy)
    finally:
        pickler.unregister_pickle_by_value(autoscaling)
    policy = pickler.loads(data)(ScalingDirective)
    assert policy({Deployment("f"): context(1, 0)}) == ({Deployment("f"): 1}, {})


def test_the_shipped_configuration_names_the_policy() -> None:
    content = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(content).applications
    assert application.autoscaling_policy is not None
    module, _, name = application.autoscaling_policy["policy_function"].partition(":")
    assert (module, name) == (FormatPolicy.__module__, FormatPolicy.__name__)


def test_formats_scale_within_the_settings() -> None:
    one, many = Settings(), Settings(max_replicas=3)
    assert format_options(GgufBackend(), one) == {"num_replicas": 1}
    on_demand = format_options(EchoBackend(), one)
    assert "request_router_config" not in on_demand
    assert on_demand["autoscaling_config"].items() >= {"min_replicas": 0, "max_replicas": 1}.items()
    several = format_options(GgufBackend(), many)
    assert several["request_router_config"]["request_router_class"] is ResidencyRouter
    assert several["autoscaling_config"].items() >= {"min_replicas": 1, "max_replicas": 3}.items()


def test_processes_reserve_what_the_cluster_counts() -> None:
    all_bytes = [256 * MIB, GIB]
    unified = reservation(GIB + 1, {"unified_memory": 16000.0, "memory": GIB}, all_bytes)
    assert unified == {"resources": {"unified_memory": 1025}}
    assert reservation(GIB, {"memory": 2.0 * GIB}, all_bytes) == {"memory": GIB}
    assert reservation(GIB, {"memory": 1.0 * GIB}, all_bytes) == {}
    assert reservation(GIB, {"CPU": 8.0}, all_bytes) == {}
