"""Starts the server in the foreground: runs `serve run` as a child and stops its process tree."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import FrameType

import psutil
import yaml

from core.errors import ImpetusError
from core.keys import MANAGEMENT_TOKEN, key_file, read_key
from core.settings import Settings, load_settings
from core.units import MIB
from deployments.options import check_settings
from deployments.router.listener import bind, check_exposure
from deployments.serve import message_size
from deployments.serve.resources import UNIFIED_MEMORY
from deployments.start.drain import drain, local_url
from scheduler.sensors.machine import machine_memory_bytes

ROOT = Path(__file__).resolve().parents[2]
_START_LIMIT_S = 180.0
_STOP_LIMIT_S = 30.0
_POLL_S = 0.2
_WATCH_S = 5.0
_SHOWN_LOG_LINES = 15


class Launcher:
    """One run of the server: start, wait until ready, wait for the end, leave no process behind."""

    def __init__(self, config: Path, settings: Settings) -> None:
        self._config = config
        self._settings = settings
        self._log_path = settings.home / "logs" / "serve.log"
        self._child: subprocess.Popen[bytes] | None = None
        self._descendants: dict[int, psutil.Process] = {}
        self._stop_signal = 0
        self._signals = 0
        self._woken = threading.Event()
        self._is_serving = False

    def run(self) -> int:
        """Run the server; return the exit code.  Blocks until it exits or a signal arrives."""
        check_exposure(self._settings)
        bind(self._settings.host, self._settings.port).close()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, self._on_signal)
        say(f"Starting on {self._settings.base_url} …")
        try:
            self._start()
            if not self._wait_until_ready():
                return 0 if self._stop_signal else 1
            self._is_serving = True
            self._show_banner()
            return self._wait_for_end()
        finally:
            self._stop()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        # SIGCHLD only wakes the waiting loop, which then checks the child.
        if number != signal.SIGCHLD:
            self._stop_signal = number
            self._signals += 1
        self._woken.set()

    def _start(self) -> None:
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        serve = Path(sys.executable).with_name("serve")
        command = [str(serve), "run", "--address", "local", str(self._config)]
        with self._log_path.open("wb") as log:
            # A separate session: the terminal's Ctrl-C reaches only this process.
            self._child = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(self._settings),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _wait_until_ready(self) -> bool:
        limit = time.monotonic() + _START_LIMIT_S
        while not self._stop_signal:
            self._remember_descendants()
            if self._is_ready():
                return True
            if self._has_failed() or time.monotonic() > limit:
                self._show_failure()
                return False
            time.sleep(_POLL_S)
        return False

    def _is_ready(self) -> bool:
        try:
            url = f"{local_url(self._settings)}/readyz"
            with urllib.request.urlopen(url, timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return False

    def _has_failed(self) -> bool:
        assert self._child is not None
        return self._child.poll() is not None or "DEPLOY_FAILED" in self._log_text()

    def _log_text(self) -> str:
        try:
            return self._log_path.read_text(errors="replace")
        except OSError:
            return ""

    def _show_failure(self) -> None:
        lines = self._log_text().splitlines()[-_SHOWN_LOG_LINES:]
        say("The server did not start. The end of its log:")
        for line in lines:
            say(f"  {line}")
        say(f"Full log: {self._log_path}")

    def _show_banner(self) -> None:
        base_url = self._settings.base_url
        match = re.search(r"dashboard at[^\n]*?(\d[\d.]+:\d+)", self._log_text())
        key = ' -H "Authorization: Bearer $IMPETUS_API_KEY"' if self._settings.api_key else ""
        body = (
            '{"model": "smollm2-135m-instruct", '
            '"messages": [{"role": "user", "content": "Say hello."}]}'
        )
        say("")
        say(f"  Base URL       {base_url}")
        say(f"  Models         {base_url}/models")
        if match:
            say(f"  Ray dashboard  http://{match[1]} (token: {token_path(self._settings)})")
        say(f"  Logs           {self._log_path}")
        say(f"  Management     X-Impetus-Token: {read_key(self._settings.home, MANAGEMENT_TOKEN)}")
        say(
            "                 (needed only by web pages that call /api/, and instead of an API key)"
        )
        say("")
        say(f"  curl {base_url}/chat/completions -H 'Content-Type: application/json'{key} \\")
        say(f"    -d '{body}'")
        say("")
        say("Ctrl-C stops the server.")

    def _wait_for_end(self) -> int:
        assert self._child is not None
        while not self._stop_signal:
            self._remember_descendants()
            code = self._child.poll()
            if code is not None:
                say(f"The server exited with code {code}. See its log: {self._log_path}")
                return code or 1
            self._woken.wait(_WATCH_S)
            self._woken.clear()
        return 0

    def _remember_descendants(self) -> None:
        """Record the process tree: at the end some of it may have lost its parent."""
        assert self._child is not None
        try:
            for process in psutil.Process(self._child.pid).children(recursive=True):
                self._descendants.setdefault(process.pid, process)
        except psutil.NoSuchProcess:
            return

    def _stop(self) -> None:
        """Stop the server, wait, and kill what is left of its process tree."""
        if self._child is None:
            return
        if self._child.poll() is None:
            say("Stopping … (Ctrl-C again to stop at once)")
            self._remember_descendants()
            if self._is_serving:
                drain(self._settings, self._is_impatient)
            self._child.send_signal(signal.SIGINT)
            self._wait_for_child(_STOP_LIMIT_S)
        patience_s = 0.5 if self._is_impatient() else 5.0
        _, left = psutil.wait_procs(list(self._descendants.values()), timeout=patience_s)
        for process in left:
            _signal(process, signal.SIGTERM)
        _, left = psutil.wait_procs(left, timeout=patience_s)
        for process in left:
            _signal(process, signal.SIGKILL)
        psutil.wait_procs(left, timeout=5)

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
            self._woken.wait(_POLL_S)
            self._woken.clear()


def _signal(process: psutil.Process, number: int) -> None:
    try:
        # psutil checks that the pid was not reused by another process.
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def say(line: str) -> None:
    """Print a line to the terminal."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def environment(settings: Settings) -> dict[str, str]:
    """Return the child's environment: ours, plus Ray's settings of scripts/env where unset."""
    values = dict(os.environ)
    # scripts/env has the default; a larger `max_body` raises it.
    values.setdefault(message_size.VARIABLE, str(message_size.message_limit(settings)))
    for line in (ROOT / "scripts" / "env").read_text().splitlines():
        name, separator, value = line.partition("=")
        if separator and not line.startswith("#"):
            values.setdefault(name.strip(), value.strip())
    values.setdefault("RAY_AUTH_TOKEN_PATH", str(token_path(settings)))
    memory = {UNIFIED_MEMORY: machine_memory_bytes() // MIB}
    values.setdefault("RAY_OVERRIDE_RESOURCES", json.dumps(memory))
    return values


def token_path(settings: Settings) -> Path:
    """Return the file of Ray's token; created with access for this user only if missing."""
    return key_file(settings.home, "ray_token")


def read_settings(config: Path) -> Settings:
    """Read the settings that `build` will get.  Raises ImpetusError naming the file or field."""
    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
        application = content["applications"][0]
        arguments = application.get("args")
    except OSError as problem:
        raise ImpetusError(
            f"The configuration file {config} cannot be read: {problem.strerror}. Check its path "
            "and its permissions."
        ) from problem
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as problem:
        raise ImpetusError(
            f"The configuration file {config} is not valid YAML: {_place_of(problem)}."
        ) from problem
    except (LookupError, TypeError, AttributeError) as problem:
        raise ImpetusError(
            f"The configuration file {config} has no application; start from the "
            "serve_config.yaml of this project."
        ) from problem
    settings = load_settings(arguments)
    check_settings(settings)
    return settings


def _place_of(problem: Exception) -> str:
    mark = getattr(problem, "problem_mark", None)
    cause = getattr(problem, "problem", None) or "it is not UTF-8 text of a plausible depth"
    return f"{cause}, line {mark.line + 1}" if mark else str(cause)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="scripts/serve", description=__doc__)
    parser.add_argument("config", nargs="?", type=Path, default=ROOT / "serve_config.yaml")
    config = parser.parse_args().config.resolve()
    try:
        if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "0") not in ("", "0"):
            raise ImpetusError(
                "RAY_SERVE_ENABLE_HA_PROXY is set; it would listen on every interface. Unset it."
            )
        return Launcher(config, read_settings(config)).run()
    except ImpetusError as problem:
        sys.stderr.write(f"impetus: {problem.message}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
