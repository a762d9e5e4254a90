"""No task or thread runs unwatched: each is supervised, or it stands here with the reason."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("backends", "catalog", "core", "deployments", "router", "scheduler", "training")
# What starts something that goes on by itself.
STARTERS = frozenset(
    (
        "create_task",
        "ensure_future",
        "run_coroutine_threadsafe",
        "start_new_thread",
        "Thread",
        "Timer",
        "TaskGroup",
    )
)
REASONS = {
    "backends/apple/sessions.py:AppleSession.__init__": "its end is a result; `join` waits for it",
    "backends/embedding/engine.py:EmbeddingEngine.__init__": "`is_failed`, the watch",
    "backends/engine/accelerator_lock.py:AcceleratorLock.__init__": "`problem`, in health checks",
    "backends/engine/loop.py:EngineLoop._start": "`is_failed` and the watch see its end",
    "backends/engine/preparation.py:PreparationThreads._ensure_idle_thread": "its watch",
    "backends/engine/request.py:events_of": "awaited in the same function",
    "catalog/convert/quality/measure.py:_Measurement._watched": "`log_failure`; ends with a child",
    "catalog/convert/run.py:_run_step": "`log_failure`; ends with its conversion",
    "core/child.py:die_with_input": "ends the process",
    "core/parent.py:exit_with_parent": "ends the process",
    "core/stack.py:call_with_stack": "joined in the same function",
    "core/supervision.py:Supervisor._add": "the supervisor",
    "core/supervision.py:Supervisor.run_once": "the supervisor",
    "core/supervision.py:call_in_thread": "its result is awaited",
    "deployments/activity.py:DeathRecords.cause": "awaited by all requests that ask",
    "deployments/jobs/conversions.py:ConversionJobs._converted": "awaited; a held one by the next",
    "deployments/jobs/memory.py:MemoryLeases.held": "`log_failure`; ends with its job",
    "deployments/jobs/local_files.py:LocalFiles._look": "awaited there; its late end is counted",
    "deployments/jobs/runner.py:JobRunner._begin": "catches everything; its end is a job's state",
    "deployments/replica/deployment.py:FormatReplica._run": "awaited in the same function",
    "deployments/replica/deployment.py:FormatReplica.stream": "awaited in the same function",
    "deployments/replica/loads.py:ModelLoads._close_when_idle": "`log_failure`; unloads await it",
    "deployments/replica/loads.py:ModelLoads.load": "awaited in the same function",
    "deployments/router/dispatch.py:HandleDispatcher._run_locally": "its end sets a future",
    "deployments/scheduler/deaths.py:ProcessDeaths._examine": "awaited in the same function",
    "deployments/scheduler/thermal.py:SensorReader.read": "awaited by this poll or the next one",
    "deployments/serve/broadcast.py:_BroadcastResponse.__init__": "callers await it",
    "deployments/start/readiness.py:ReadinessWatch.__init__": "the launcher's loop reads its state",
    "deployments/transport/acceptor.py:Acceptor._open": "catches everything; one connection",
    "deployments/transport/socket.py:FrameReceiver._run": "awaited in the same function",
    "router/api/events.py:_EventStream.__call__": "awaited in the same function",
    "router/answers/event_feed.py:unless_disconnected": "awaited in the same function",
    "router/answers/event_feed.py:EventFeed.__aenter__": "ended with its request",
}


def started(source: str, name: str) -> Iterator[str]:
    """Yield `file:function` for each call that starts a task or a thread."""

    def visit(node: ast.AST, scope: tuple[str, ...]) -> Iterator[str]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            scope = (*scope, node.name)
        if isinstance(node, ast.ClassDef) and any(_name(base) == "Thread" for base in node.bases):
            yield f"{name}:{'.'.join(scope)}"
        if isinstance(node, ast.Call) and _name(node.func) in STARTERS:
            yield f"{name}:{'.'.join(scope)}"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, scope)

    yield from visit(ast.parse(source), ())


def _name(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def test_every_task_and_thread_is_supervised_or_has_a_reason() -> None:
    files = (file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py")))
    found = {
        place
        for file in files
        for place in started(file.read_text("utf-8"), file.relative_to(ROOT).as_posix())
    }
    unknown = sorted(found - REASONS.keys())
    assert not unknown, "use core.supervision, or give the reason here"
    assert not sorted(REASONS.keys() - found), "these start nothing any more"


def test_the_search_finds_what_it_should() -> None:
    source = """
import asyncio, threading
from asyncio import create_task
class Mine(threading.Thread):
    pass
class A:
    def f(self):
        asyncio.get_running_loop().create_task(x())
        async def g():
            create_task(x())
        threading.Thread(target=g).start()
async def h():
    async with asyncio.TaskGroup() as group:
        await asyncio.to_thread(print)
"""
    assert list(started(source, "a.py")) == [
        "a.py:Mine",
        "a.py:A.f",
        "a.py:A.f.g",
        "a.py:A.f",
        "a.py:h",
    ]
