"""Step `server`: starts the server with folders of its own, uses it, and stops it again."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from scripts.doctor_lib.child import end_group
from scripts.doctor_lib.client import AnswerProblem, Client
from scripts.doctor_lib.mac import recent_crashes
from scripts.doctor_lib.machine import Machine
from scripts.doctor_lib.processes import Processes
from scripts.doctor_lib.row import FAIL, NEEDS_MAC, OK, WARN, Row, judged, skipped
from scripts.doctor_lib.sleep import SleepWatch, sleep_during_streams

_LAUNCHER = ("-m", "deployments.start.launcher")
# Of the user's own server; its folders, key and models are not touched.
_DROPPED = ("IMPETUS_", "RAY_")
# How Ray names the process of a format.
_REPLICA = "ray::ServeReplica:impetus:"
_TAIL_LINES = 15
_PAUSE_S = 0.25
# The server looks every five seconds whether requests run.
_AWAKE_S = 8.0


@dataclass(frozen=True)
class Limits:
    """Seconds for the start, for one answer (a first one loads its model), and for the stop."""

    start_s: float = 180.0
    answer_s: float = 120.0
    stop_s: float = 60.0


def rows(machine: Machine) -> Iterator[Row]:
    """Yield the rows of a whole run of the server; blocks for tens of seconds."""
    if machine.lacks_python:
        yield skipped("server", machine.lacks_python)
        return
    command = [str(machine.python), "-B", *_LAUNCHER]
    yield from ServerTrial(machine, command).rows()


class ServerTrial:
    """One run of the server in temporary folders; all of it is gone after `rows`."""

    def __init__(self, machine: Machine, command: Sequence[str], limits: Limits = Limits()) -> None:
        self._machine = machine
        self._command = command
        self._limits = limits
        self._folder = Path()
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._processes = Processes(machine)
        self.log = ""

    def rows(self) -> Generator[Row, None, None]:
        """Start, ask, disturb and stop the server; yield a row for each."""
        # Short: Ray's sockets lie below it.
        self._folder = Path(tempfile.mkdtemp(prefix="impetus-doctor-", dir="/tmp"))
        began = time.time()
        try:
            row = self._start()
            yield row
            if row.state != FAIL:
                yield from self._use()
            yield from self._stop(row.state == FAIL)
            yield self._crashes(began)
        finally:
            self._clean_up()

    def _clean_up(self) -> None:
        try:
            if self._process is not None:
                end_group(self._process)
            self._processes.kill()
        finally:
            self.log = self._tail()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> Row:
        self._port = _free_port()
        environment = {
            name: value
            for name, value in self._machine.environment.items()
            if not name.startswith(_DROPPED)
        }
        environment.update(
            IMPETUS_HOME=str(self._folder / "home"),
            IMPETUS_PORT=str(self._port),
            IMPETUS_HOST="127.0.0.1",
            RAY_TMPDIR=str(self._folder),
            # Ray's processes leave folders of multiprocessing there when they are ended.
            TMPDIR=str(self._folder / "temporary"),
        )
        (self._folder / "temporary").mkdir()
        with (self._folder / "output").open("wb") as output:
            self._process = subprocess.Popen(
                list(self._command),
                cwd=str(self._machine.root),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        began = time.monotonic()
        client = self._client()
        while (waited := time.monotonic() - began) < self._limits.start_s:
            self._processes.remember(self._process.pid)
            if (code := self._process.poll()) is not None:
                problem = f"It ended with code {code}. {self._tail()}"
                return judged("server start", f"{waited:.0f} s", problem, "send the report")
            if client.is_ready():
                return Row("server start", OK, f"ready after {waited:.0f} s")
            time.sleep(_PAUSE_S)
        problem = f"It was not ready within {self._limits.start_s:.0f} s. {self._tail()}"
        return judged("server start", f"{waited:.0f} s", problem, "send the report")

    def _use(self) -> Iterator[Row]:
        client = self._client()
        try:
            models = client.models()
        except AnswerProblem as problem:
            yield judged("list of models", "", str(problem), "send the report")
            return
        chats = first_of_each_format(models, "chat")
        for name, model in chats.items():
            if name != "echo":
                yield self._row(f"chat, {name}", partial(client.chat, model))
        for name, model in first_of_each_format(models, "embedding").items():
            yield self._row(f"embedding, {name}", partial(client.embed, model))
        model = chats.get("gguf") or next(iter(chats.values()), "")
        if not model:
            yield judged("chat", "no model", "No chat model is listed.", "scripts/setup torch")
            return
        yield self._row("cancelled stream", lambda: client.cancel(model))
        if self._machine.may_sleep:
            watch = SleepWatch()
            say = partial(print, flush=True)
            yield self._row("sleep", partial(sleep_during_streams, client, model, say, watch))
        yield self._kept_awake()
        yield self._row("killed process", lambda: self._kill_replica(client, model))
        yield self._row("unload", lambda: self._unload(client, model))

    def _kept_awake(self) -> Row:
        """Look for the assertion that is held during requests and a minute longer."""
        what = "kept awake"
        if not self._machine.is_mac:
            return skipped(what, NEEDS_MAC)
        held = ""
        end = time.monotonic() + _AWAKE_S
        while not held and time.monotonic() < end:
            held = _assertion(self._machine.run("pmset", "-g", "assertions").text)
            time.sleep(_PAUSE_S)
        problem = "" if held else "Nothing keeps this Mac awake while requests run."
        cure = "right on battery with 20 % or less; else send the report"
        return judged(what, held, problem, cure, WARN)

    def _row(self, what: str, action: Callable[[], str]) -> Row:
        began = time.monotonic()
        try:
            value = action()
        except AnswerProblem as problem:
            took = f"{time.monotonic() - began:.1f} s"
            return judged(what, took, str(problem), "send the report")
        took = f"{time.monotonic() - began:.1f} s"
        return Row(what, OK, f"{value}, {took}" if value else took)

    def _kill_replica(self, client: Client, model: str) -> str:
        """Kill the process of a format as a crash would; the next answer needs a new one."""
        pid = self._replica("gguf")
        if not pid:
            raise AnswerProblem("The process of GGUF was not found.")
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        end = time.monotonic() + self._limits.stop_s
        while self._processes.is_alive(pid) and time.monotonic() < end:
            time.sleep(_PAUSE_S)
        client.chat(model)
        return "replaced"

    def _unload(self, client: Client, model: str) -> str:
        pid = self._replica("gguf")
        held = self._processes.memory_bytes(pid)
        client.unload(model)
        left = []
        for pause in (0.1, 0.4, 1.5):
            time.sleep(pause)
            left.append(self._processes.memory_bytes(pid))
        told = ", ".join(f"{value / 2**20:.0f}" for value in left)
        return f"{held / 2**20:.0f} MiB before; {told} MiB after 0.1, 0.5 and 2 s"

    def _replica(self, name: str) -> int:
        assert self._process is not None
        self._processes.remember(self._process.pid)
        return self._processes.find(f"{_REPLICA}{name}")

    def _stop(self, has_failed: bool) -> Iterator[Row]:
        assert self._process is not None
        self._processes.remember(self._process.pid)
        began = time.monotonic()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            code = self._process.wait(timeout=self._limits.stop_s)
        except subprocess.TimeoutExpired:
            problem = f"Ctrl-C did not stop it within {self._limits.stop_s:.0f} s."
            yield judged("stop by Ctrl-C", "", problem, "send the report", WARN)
        else:
            value = f"code {code} after {time.monotonic() - began:.1f} s"
            problem = f"It ended with code {code}." if code and not has_failed else ""
            yield judged("stop by Ctrl-C", value, problem, "send the report", WARN)
        left = self._processes.alive()
        problem = f"{len(left)} processes go on: {', '.join(left)[:200]}." if left else ""
        if not problem and _is_open(self._port):
            problem = f"Something still listens on port {self._port}."
        yield judged("left behind", f"{len(left)} processes", problem, "send the report", WARN)

    def _crashes(self, since: float) -> Row:
        what = "crash reports"
        if not self._machine.is_mac:
            return skipped(what, NEEDS_MAC)
        names = [path.name for path in recent_crashes(self._machine, since)]
        problem = f"The run left {', '.join(names)[:200]}." if names else ""
        return judged(what, len(names), problem, "send them with the report", WARN)

    def _client(self) -> Client:
        try:
            token = (self._folder / "home" / "keys" / "management_token").read_text().strip()
        except OSError:
            token = ""
        return Client(f"http://127.0.0.1:{self._port}", self._limits.answer_s, token)

    def _tail(self) -> str:
        try:
            text = (self._folder / "output").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return self.log
        return "\n".join(text.splitlines()[-_TAIL_LINES:])


def first_of_each_format(models: Sequence[Mapping[str, Any]], capability: str) -> dict[str, str]:
    """Return the id of the smallest model with this capability for each format."""
    found: dict[str, tuple[int, str]] = {}
    for model in models:
        if capability in model.get("capabilities", ()):
            name = str(model.get("format", "unknown"))
            size = (int(model.get("parameters") or 0), str(model["id"]))
            found[name] = min(found.get(name, size), size)
    return {name: model_id for name, (_, model_id) in found.items()}


def _assertion(text: str) -> str:
    """Return the line of `pmset -g assertions` for the server's caffeinate; empty without one."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    marks = ("(caffeinate)", "PreventUserIdleSystemSleep")
    return next((line for line in lines if all(mark in line for mark in marks)), "")


def _is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
