"""Plug-ins that add model formats: their interface, and a test in a child process before import."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pluggy

from core.child import (
    AnswerTooLong,
    Child,
    ChildEnded,
    describe_exit,
    die_with_input,
    die_with_parent,
    take_stdout,
)

GROUP = "impetus"
PROBE_LIMIT_S = 30.0

_PROBE = "from core.plugins import probe_main; probe_main()"
_CODE_FOLDER = Path(__file__).resolve().parents[1]
_ANSWER_LIMIT_BYTES = 65536
_LONGEST_REASON = 2000
_DYING_S = 1.0

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


class PluginSpecs:
    """The hooks that a plug-in may implement."""

    @hookspec
    def register_backends(self, register: Callable[[Any], None]) -> None:
        """Call `register` with an instance of `backends.base.Backend` for each format."""


def plugin_manager() -> pluggy.PluginManager:
    """Return a manager that knows the hooks and has no plug-ins registered."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(PluginSpecs)
    return manager


def probe(entries: Sequence[EntryPoint]) -> list[str]:
    """Import each plug-in in a child process; return why each failed, empty where it did not.

    The children run side by side; one that did not start or was killed runs once more.  Blocks for
    as long as the slowest takes, 30 s at most each time; starts nothing without plug-ins.
    """
    results = _probe_all(entries)
    # A process that did not start or was killed says nothing about its plug-in.
    again = [index for index, result in enumerate(results) if result.may_pass]
    for index, result in zip(again, _probe_all([entries[index] for index in again]), strict=True):
        results[index] = result
    return [result.reason for result in results]


@dataclass(frozen=True, slots=True)
class _Result:
    """Why a plug-in failed, empty if it did not; `may_pass`: another try may give another one."""

    reason: str
    may_pass: bool = False


def _probe_all(entries: Sequence[EntryPoint]) -> list[_Result]:
    deadline = time.monotonic() + PROBE_LIMIT_S
    probes = [_start_probe(entry) for entry in entries]
    return [each if isinstance(each, _Result) else _result(each, deadline) for each in probes]


def describe_failure(error: BaseException) -> str:
    """Return the text for what a plug-in raised."""
    return f"it raised {type(error).__name__}: {error}"[:_LONGEST_REASON]


def _start_probe(entry: EntryPoint) -> Child | _Result:
    """Start a plug-in's child process; return the reason if that fails."""
    folders = [folder or os.getcwd() for folder in (str(_CODE_FOLDER), *sys.path)]
    # A plug-in that will run in this process may see its environment.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    command = [sys.executable, "-P", "-c", _PROBE, entry.name, entry.value]
    try:
        return Child(
            command, environment, answer_limit_bytes=_ANSWER_LIMIT_BYTES, keeps_stderr=True
        )
    except (OSError, RuntimeError) as error:
        cause = getattr(error, "strerror", None) or error
        return _Result(f"the process to test it did not start ({cause})", may_pass=True)


def _result(child: Child, deadline: float) -> _Result:
    reason, may_pass = "", False
    try:
        reason = str(json.loads(child.read_line(deadline))["reason"])
    except TimeoutError:
        reason = f"its import took longer than {PROBE_LIMIT_S:g} s"
    except ChildEnded:
        code = child.close(grace_s=_DYING_S)
        may_pass = code in (-signal.SIGKILL, -signal.SIGTERM)
        reason = f"the process that imported it {describe_exit(code)}"
    except (AnswerTooLong, ValueError, KeyError, TypeError):
        reason = "the process that imported it sent an answer that could not be read"
    child.close()
    output = f" (the end of its output: {child.stderr_tail})" if child.stderr_tail else ""
    return _Result(f"{reason}{output}" if reason else "", may_pass)


def probe_main() -> None:
    """Import the plug-in that the arguments name, call its hooks and report; for the child."""
    die_with_parent()
    die_with_input(sys.stdin)
    out = take_stdout()
    reason = ""
    try:
        manager = plugin_manager()
        name, value = sys.argv[1:]
        manager.register(EntryPoint(name, value, GROUP).load(), name=name)
        manager.hook.register_backends(register=lambda backend: backend.name)
    except BaseException as error:
        reason = describe_failure(error)
    out.write(json.dumps({"reason": reason}) + "\n")
    out.flush()
    # Threads that the plug-in started must not delay the exit.
    os._exit(0)
