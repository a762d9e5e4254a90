"""Starts the server in the foreground: runs `serve run` as a child and stops its process tree."""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType

import psutil

from core.child import SERVER_ID
from core.errors import ImpetusError
from core.gpu_failures import gpu_failures
from core.keys import MANAGEMENT_TOKEN, read_key
from core.settings import Settings, unknown_variables
from deployments.serve.guard import start_guard
from deployments.serve.members import Helpers, Members
from deployments.serve.processes import (
    descendants,
    end_processes,
    new_server_id,
    processes_of,
    remember,
    wait_for_ends,
)
from deployments.start.checks import prepare_start
from deployments.start.drain import drain
from deployments.start.environment import ROOT, environment, token_path
from deployments.start.log_file import LogFile
from deployments.start.progress import Signs, StartProgress, signs_of
from deployments.start.readiness import Readiness, ReadinessWatch, ask_readiness
from deployments.start.sign_in import sign_in_link

# The exit code if the server was not started, as for a wrong command line.
_REFUSED = 2
_STOP_LIMIT_S = 30.0
_POLL_S = 0.2
_WATCH_S = 1.0
# Every so many rounds of watching: the process tree and the size of the log.
_ROUNDS_BETWEEN_SCANS = 5
_BROKEN_GRACE_S = 3.0


class Launcher:
    """One run of the server: start, wait until ready, wait for the end, leave no process behind."""

    def __init__(self, config: Path, settings: Settings) -> None:
        self._config = config
        self._settings = settings
        self._log = LogFile(settings.home / "logs" / "serve.log")
        self._server_id = new_server_id(os.getpid())
        self._child: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._descendants: dict[int, psutil.Process] = {}
        self._members = Members(lambda: list(self._descendants.values()))
        self._helpers = Helpers(lambda: list(self._descendants.values()), self._log.path)
        self._stop_signal = 0
        self._signals = 0
        # A handler of signals may interrupt the wait for it, for which only this class is safe.
        self._woken: SimpleQueue[None] = SimpleQueue()
        self._is_serving = False
        self._is_broken = False

    def run(self) -> int:
        """Run the server; return the exit code.  Blocks until it exits or a signal arrives."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            # `nohup` ignores SIGHUP so that the server outlives its terminal.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        code = 1
        try:
            say(f"Starting on {self._settings.base_url} …")
            for notice in gpu_failures():
                say(notice)
            self._start()
            if self._wait_until_ready():
                self._is_serving = True
                self._show_banner()
                code = self._wait_for_end()
            elif self._stop_signal:
                code = 0
        except BrokenPipeError:
            # Nobody reads this output any more; the shell's other commands end in the same way.
            _silence()
        finally:
            self._stop()
        if code == 0:
            self._log.close_in_order()
        return code

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        # SIGCHLD only wakes the waiting loop, which then checks the child.
        if number != signal.SIGCHLD:
            self._stop_signal = number
            self._signals += 1
        self._woken.put(None)

    def _pause(self, limit_s: float) -> None:
        """Wait until a signal arrives or the readiness changes, at most `limit_s`."""
        with suppress(Empty):
            self._woken.get(timeout=limit_s)
            while True:
                self._woken.get_nowait()

    def _start(self) -> None:
        serve = Path(sys.executable).with_name("serve")
        command = [sys.executable, str(serve), "run", "--address", "local", str(self._config)]
        with self._log.open() as log:
            # A separate session: the terminal's Ctrl-C reaches only this process.
            self._child = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**environment(self._settings), SERVER_ID: self._server_id},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._keep_guard()

    def _keep_guard(self) -> None:
        """Start the process that ends the server if this one is killed; again if that one is."""
        assert self._child is not None
        if self._guard is None or self._guard.poll() is not None:
            self._guard = start_guard(self._child.pid, self._server_id, owned=True)

    def _wait_until_ready(self) -> bool:
        progress = StartProgress()
        while not self._stop_signal:
            self._remember_descendants()
            answer = ask_readiness(self._settings)
            if answer is Readiness.READY:
                return True
            if self._has_failed():
                self._show_failure("The server did not start.")
                return False
            if progress.is_due() and (cause := progress.note(self._signs(answer))):
                self._show_failure(cause)
                return False
            time.sleep(_POLL_S)
        return False

    def _signs(self, answer: Readiness) -> Signs:
        assert self._child is not None
        processes = list(self._descendants.values())
        with suppress(psutil.NoSuchProcess):
            processes.append(psutil.Process(self._child.pid))
        return signs_of(processes, answer, self._log.text())

    def _has_failed(self) -> bool:
        assert self._child is not None
        return (
            self._child.poll() is not None
            or "DEPLOY_FAILED" in self._log.text()
            or bool(self._members.ended())
        )

    def _show_failure(self, what: str) -> None:
        ended = self._members.ended()
        self._is_broken = bool(ended)
        say(f"{what} {ended + ' ended. ' if ended else ''}The end of its log:")
        for line in self._log.last_lines():
            say(f"  {line}")
        say(f"Full log: {self._log.path}")

    def _show_banner(self) -> None:
        base_url = self._settings.base_url
        match = re.search(r"dashboard at[^\n]*?(\d[\d.]+:\d+)", self._log.text())
        key = ' -H "Authorization: Bearer $IMPETUS_API_KEY"' if self._settings.api_key else ""
        body = (
            '{"model": "smollm2-135m-instruct", '
            '"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 64}'
        )
        say("")
        say(f"  Base URL       {base_url}")
        say(f"  Models         {base_url}/models")
        if match:
            say(f"  Ray dashboard  http://{match[1]} (token: {token_path(self._settings)})")
        say(f"  Logs           {self._log.path}")
        say(f"  Sign in        {sign_in_link(self._settings)}")
        say("                 (a browser, once within an hour; scripts/keys link prints another)")
        say(f"  Management     X-Impetus-Token: {read_key(self._settings.home, MANAGEMENT_TOKEN)}")
        say("                 (for /api/: web pages need it; others may send it as a key)")
        say("")
        say(f"  curl {base_url}/chat/completions -H 'Content-Type: application/json'{key} \\")
        say(f"    -d '{body}'")
        say("")
        say("Ctrl-C stops the server.")

    def _wait_for_end(self) -> int:
        """Return the exit code: 0 after a signal, else not 0.  Blocks."""
        assert self._child is not None
        readiness = ReadinessWatch(self._settings, partial(self._woken.put, None))
        rounds = 0
        while not self._stop_signal:
            if rounds % _ROUNDS_BETWEEN_SCANS == 0:
                self._remember_descendants()
                self._log.bound()
            rounds += 1
            code = self._child.poll()
            if code is not None:
                say(f"The server exited with code {code}. See its log: {self._log.path}")
                self._is_broken = True
                return code or 1
            if cause := self._broken_because(readiness):
                self._is_broken = True
                say(f"{cause}; the server stops. See its log: {self._log.path}")
                return 1
            self._keep_guard()
            for name in self._helpers.restart():
                say(f"{name} ended and was started again.")
            self._pause(_WATCH_S)
        readiness.stop()
        return 0

    def _broken_because(self, readiness: ReadinessWatch) -> str:
        if ended := self._members.ended():
            return f"{ended} ended, and the server cannot continue without it"
        return readiness.verdict

    def _remember_descendants(self) -> None:
        """Record the process tree: at the end some of it may have lost its parent."""
        assert self._child is not None
        with suppress(psutil.NoSuchProcess):
            remember(self._descendants, descendants(psutil.Process(self._child.pid)))
        self._members.look()
        self._helpers.look()

    def _stop(self) -> None:
        """Stop the server, wait, and kill what is left of its process tree."""
        if self._child is None:
            return
        if self._child.poll() is None:
            if not self._is_broken:
                _say_if_heard("Stopping … (Ctrl-C again to stop at once)")
            self._remember_descendants()
            if self._is_serving and not self._is_broken:
                drain(self._settings, self._is_impatient)
            # Serve's own shutdown waits in vain for parts that have died.
            if self._is_broken:
                self._child.terminate()
            else:
                self._child.send_signal(signal.SIGINT)
            self._wait_for_child(_BROKEN_GRACE_S if self._is_broken else _STOP_LIMIT_S)
        patience_s = 0.5 if self._is_impatient() else _BROKEN_GRACE_S if self._is_broken else 5.0
        wait_for_ends(self._descendants.values(), patience_s)
        for _ in range(2):
            left = {process.pid: process for process in processes_of(self._server_id)}
            left.update(self._descendants)
            end_processes(wait_for_ends(left.values(), 0), patience_s)
        self._helpers.close()
        self._end_guard()

    def _end_guard(self) -> None:
        """Close the guard's pipe: it ends what is left, and itself."""
        if self._guard is None:
            return
        assert self._guard.stdin is not None
        with suppress(OSError):
            self._guard.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._guard.wait(timeout=20)

    def _is_impatient(self) -> bool:
        """Whether a second signal arrived: then running requests are not waited for."""
        return self._signals > 1

    def _wait_for_child(self, limit_s: float) -> None:
        """Wait until the server exits; kill it at the limit or if the user interrupts again."""
        assert self._child is not None
        end = time.monotonic() + limit_s
        while self._child.poll() is None:
            if self._is_impatient() or time.monotonic() > end:
                self._child.kill()
                self._child.wait()
                return
            self._pause(_POLL_S)


def say(line: str) -> None:
    """Print a line to the terminal.  Raises BrokenPipeError if nobody can read it any more.

    Does nothing without a standard output, as in a service.
    """
    if sys.stdout is None:
        return
    try:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    except (OSError, ValueError) as problem:
        raise BrokenPipeError from problem


def _say_if_heard(line: str) -> None:
    try:
        say(line)
    except BrokenPipeError:
        _silence()


def _silence() -> None:
    """Let later output, also Python's own at exit, go nowhere."""
    with suppress(OSError, ValueError):
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, 1)
        os.close(descriptor)


def main() -> int:
    """Run the command line; return 2 if its settings, or the machine, forbid the start."""
    parser = argparse.ArgumentParser(prog="scripts/serve", description=__doc__)
    parser.add_argument("config", nargs="?", type=Path, default=ROOT / "serve_config.yaml")
    config = parser.parse_args().config.absolute()
    try:
        for line in unknown_variables():
            _warn(line)
        return Launcher(config, prepare_start(config)).run()
    except ImpetusError as problem:
        _warn(problem.message)
    except OSError as problem:
        _warn(f"The server cannot be started: {problem.strerror or problem}.")
    return _REFUSED


def _warn(line: str) -> None:
    if sys.stderr is not None:
        with suppress(OSError):
            sys.stderr.write(f"impetus: {line}\n")


if __name__ == "__main__":
    sys.exit(main())
