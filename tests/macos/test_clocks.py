"""Which clocks the server reads: an event loop's clock goes on while a Mac sleeps.

uvloop's is mach_continuous_time there, `time.monotonic` is mach_absolute_time, which stops.
tests/unit/core/test_awake_time.py shows what follows for requests, streams and parts.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.install import ROOT

ROOMS = ("backends", "catalog", "core", "deployments", "router", "scheduler")
# All of a loop's timers that fell due end at once when the Mac wakes up.  These limit one call or
# one pause, for at most two minutes, and whoever meets the limit asks again.
ENDED_BY_SLEEP = {
    "backends/apple/sessions.py": "an estimate takes the place of the system's count",
    "catalog/hub/download/run.py": "the speed of a download is looked at early",
    "core/awake_time.py": "the timers that do not count time asleep",
    "core/supervision.py": "a part counts as settled",
    "deployments/jobs/calls/jobs.py": "the caller asks again",
    "deployments/jobs/catalog.py": "a later scan finds the model",
    "deployments/jobs/deployment.py": "the caller asks again",
    "deployments/jobs/feed.py": "the jobs are sent early",
    "deployments/jobs/memory.py": "the lease is renewed, or runs out in the scheduler",
    "deployments/jobs/runner.py": "the queue is looked at early",
    "deployments/jobs/strain.py": "the states are asked for again",
    "deployments/router/catalog.py": "the list of models is shown without the newest scan",
    "deployments/router/events/polling.py": "the source is asked again",
    "deployments/router/listener.py": "the next health check asks again",
    "deployments/router/management.py": "replicas learn of a change with the next request",
    "deployments/router/model_states.py": "the states are asked for again",
    "deployments/router/readiness.py": "the next probe asks again",
    "deployments/router/recovery.py": "the next report is asked for",
    "deployments/router/telemetry.py": "one page of metrics lacks a part",
    "deployments/router/uploads.py": "the client sends the chunk again",
    "deployments/scheduler/deployment.py": "the scheduler's next health check asks again",
    "deployments/scheduler/formats.py": "the next report is asked for",
    "deployments/scheduler/ledger.py": "the usage is asked for early",
    "deployments/scheduler/published_states.py": "the states are sent early",
    "deployments/scheduler/recovery.py": "a replica is asked again",
    "deployments/scheduler/scanning.py": "a scan begins early",
    "deployments/scheduler/thermal.py": "the next reading is sent",
    "deployments/serve/status.py": "the status is shown without a part",
    "deployments/transport/acceptor.py": "connections are accepted again",
    "router/answers/event_stream.py": "a keep-alive is due",
    "router/events/hub.py": "a keep-alive is due; readers that are gone fetch the state again",
    "router/http/protocol.py": "an idle connection is closed",
}
# The wall clock is set by the network at any time; these write or compare dates, or begin a count.
WALL_CLOCK = {
    "backends/prefixes/disk.py",
    "catalog/last_scan.py",
    "catalog/scan/scan.py",
    "catalog/uploads/store.py",
    "catalog/uploads/trial.py",
    "deployments/activity.py",
    "deployments/decisions.py",
    "deployments/jobs/arrivals.py",
    "deployments/jobs/feed.py",
    "deployments/jobs/partials.py",
    "deployments/jobs/runner.py",
    "deployments/jobs/unrunnable.py",
    "deployments/router/credentials.py",
    "deployments/router/events/jobs.py",
    "deployments/router/events/machine.py",
    "deployments/router/events/models.py",
    "deployments/router/events/polling.py",
    "deployments/router/monitor/sampler.py",
    "deployments/scheduler/deletions.py",
    "deployments/scheduler/published_states.py",
    "deployments/scheduler/scanning.py",
    "deployments/start/leftovers.py",
    "deployments/start/sign_in.py",
    "router/answers/generation.py",
    "router/api/keys.py",
    "router/events/hub.py",
    "router/http/rate_limits.py",
}
LOOPS = ("timeout", "timeout_at", "wait_for", "call_later", "call_at")


def uses(tree: ast.AST) -> Iterator[str]:
    """Yield `loop` for each use of a loop's clock, and `wall` for each of the system's."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        owner = ast.unparse(node.value)
        names = LOOPS if owner == "asyncio" else (*LOOPS, "time") if "loop" in owner else ()
        if node.attr in names:
            yield "loop"
        elif owner == "time" and node.attr in ("time", "time_ns"):
            yield "wall"


def users(kind: str) -> set[str]:
    paths = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    found = {path: set(uses(ast.parse(path.read_text("utf-8")))) for path in paths}
    return {str(path.relative_to(ROOT)) for path, kinds in found.items() if kind in kinds}


def test_timers_of_the_loop_only_limit_what_is_tried_again() -> None:
    """Deadlines of requests and of models belong to core/awake_time.py."""
    assert users("loop") == set(ENDED_BY_SLEEP)


def test_durations_are_not_measured_by_the_wall_clock() -> None:
    assert users("wall") == WALL_CLOCK


@pytest.mark.parametrize("path", sorted(ENDED_BY_SLEEP))
def test_limits_by_the_loops_clock_are_short(path: str) -> None:
    for node in ast.walk(ast.parse(Path(ROOT / path).read_text("utf-8"))):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            name = ast.unparse(node.targets[0])
            if name.endswith(("_LIMIT_S", "_TIMEOUT_S")):
                assert float(str(node.value.value)) <= 120, name


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("async def f():\n async with asyncio.timeout(5): pass", {"loop"}),
        ("asyncio.get_running_loop().call_later(5, f)", {"loop"}),
        ("now = self._loop.time()", {"loop"}),
        ("now = time.time()", {"wall"}),
        ("field(default_factory=time.time)", {"wall"}),
        ("now = time.monotonic()", set()),
        ("self.time()", set()),
    ],
)
def test_uses_of_clocks_are_found(text: str, kinds: set[str]) -> None:
    assert set(uses(ast.parse(text))) == kinds
