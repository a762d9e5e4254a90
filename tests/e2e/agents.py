"""Agents as a user runs them in a terminal, each with a home of its own."""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tests.e2e.acp import AcpClient, acp_client
from tests.e2e.scripted import CONTEXT_TOKENS

LIMIT_S = 150.0
# Its teams and sub-agents are three quarters of its prompt, and no part of these tasks.
LEFT_OUT = (
    *("spawn_agent", "ask_question", "fetch_web_content", "search_codebase"),
    *("team_spawn_teammate", "team_shutdown_teammate", "team_status", "team_task"),
    *("team_run_task", "team_cancel_run", "team_list_runs", "team_await_runs"),
    *("team_send_message", "team_broadcast", "team_read_mailbox", "team_mission_log"),
    *("team_cleanup", "team_create_outcome", "team_attach_outcome_fragment"),
    *("team_review_outcome_fragment", "team_finalize_outcome", "team_list_outcomes"),
)


@dataclass(frozen=True, slots=True)
class Run:
    """What an agent's run left: its exit code and what it wrote."""

    code: int
    output: str
    errors: str

    @property
    def events(self) -> list[dict[str, Any]]:
        """The JSON lines of the output."""
        lines = [line for line in self.output.splitlines() if line.startswith("{")]
        return [json.loads(line) for line in lines]

    @property
    def texts(self) -> list[str]:
        """The texts of opencode's events, in order."""
        return [event["part"]["text"] for event in self.events if event["type"] == "text"]


def own_environment(home: Path) -> Mapping[str, str]:
    """Return an environment without keys, proxies and settings of the person at the machine."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    return {**kept, "HOME": str(home)}


def run_command(command: tuple[str, ...], folder: Path, home: Path, **variables: str) -> Run:
    """Run a command without a terminal and wait for its end."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**own_environment(home), **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        said = f"{_text(late.stdout)}\n{_text(late.stderr)}"
        name = Path(command[0]).name
        raise AssertionError(f"{name} did not end in {LIMIT_S:g} s:\n{said[-4000:]}") from late
    return Run(done.returncode, done.stdout, done.stderr)


@contextmanager
def started(
    command: tuple[str, ...], folder: Path, home: Path, **variables: str
) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a command in a process group of its own, which does not outlive the block."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**own_environment(home), **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # A shell's background jobs ignore Ctrl-C, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@dataclass(frozen=True, slots=True)
class Agent:
    """One agent's command line; `home` holds its settings, `folder` is what it works in."""

    node_modules: Path
    home: Path
    folder: Path
    base_url: str

    def run(self, name: str, *arguments: str, **variables: str) -> Run:
        """Run an installed command without a terminal and wait for its end."""
        return run_command(
            (str(self._program(name)), *arguments), self.folder, self.home, **variables
        )

    def interrupt(
        self, when: Callable[[], None], name: str, *arguments: str, **variables: str
    ) -> int:
        """Run a command, press Ctrl-C when `when` returns, and return its exit code."""
        command = (str(self._program(name)), *arguments)
        with started(command, self.folder, self.home, **variables) as process:
            when()
            process.send_signal(signal.SIGINT)
            return process.wait(timeout=LIMIT_S)

    def _program(self, name: str) -> Path:
        return self.node_modules / ".bin" / name


class Cline(Agent):
    """Cline's command line."""

    def configure(self, model: str) -> None:
        """Set it up as `scripts/connect` does, its telemetry off."""
        context = CONTEXT_TOKENS[model]
        self._settings.mkdir(parents=True)
        choices = {
            "telemetryOptOut": True,
            "autoUpdateEnabled": False,
            "disabledTools": LEFT_OUT,
        }
        (self._settings / "global-settings.json").write_text(json.dumps(choices))
        limits = {"name": model, "contextWindow": context, "maxInputTokens": context * 3 // 4}
        known = {"version": 1, "providers": {"openai-compatible": {"models": {model: limits}}}}
        (self._settings / "models.json").write_text(json.dumps(known))
        done = self.run("cline", *("auth", "-p", "openai", "-k", "any"), *("-m", model),
                        *("-b", self.base_url))  # fmt: skip
        assert done.code == 0, done

    def work(self, model: str, task: str) -> Run:
        """Give it a task; it runs in this one process and no daemon stays behind."""
        return self.run("cline", *self._options(model), task, **self._OFF)

    def stop_during(self, when: Callable[[], None], model: str, task: str) -> int:
        """Give it a task and press Ctrl-C when `when` returns; returns the exit code."""
        return self.interrupt(when, "cline", *self._options(model), task, **self._OFF)

    @contextmanager
    def served(self, model: str) -> Iterator[AcpClient]:
        """Start it as an editor does, in a process of its own; gives the connection to it."""
        command = (str(self._program("cline")), "--acp", "--auto-approve", "true")
        chosen = {"CLINE_PROVIDER": "openai-compatible", "CLINE_API_KEY": "any"}
        environment = {**own_environment(self.home), **chosen, "CLINE_MODEL": model, **self._OFF}
        with acp_client(command, self.folder, environment) as client:
            yield client

    @property
    def _settings(self) -> Path:
        return self.home / ".cline" / "data" / "settings"

    def _options(self, model: str) -> tuple[str, ...]:
        return (
            *("-P", "openai", "-m", model, "--json", "--auto-approve", "true"),
            *("--retries", "1"),
        )

    _OFF: ClassVar[Mapping[str, str]] = {"CLINE_SESSION_BACKEND_MODE": "local"}


class Continue(Agent):
    """Continue's command line."""

    def configure(self, model: str) -> None:
        """Write its config.yaml."""
        self.config.parent.mkdir(parents=True)
        self.config.write_text(
            "name: Local\nversion: 1.0.0\nschema: v1\nmodels:\n"
            f"  - name: {model}\n    provider: openai\n    model: {model}\n"
            f"    apiBase: {self.base_url}\n    apiKey: any\n"
            "    roles: [chat, edit, apply]\n    capabilities: [tool_use]\n"
        )

    @property
    def config(self) -> Path:
        """Its settings' file."""
        return self.home / ".continue" / "config.yaml"

    def work(self, task: str) -> Run:
        """Give it a task, every tool allowed."""
        return self.run("cn", *self._options, task, **self._OFF)

    def resume(self, task: str) -> Run:
        """Give the last session another task, in a new process."""
        return self.run("cn", "--resume", *self._options, task, **self._OFF)

    def stop_during(self, when: Callable[[], None], task: str) -> int:
        """Give it a task and press Ctrl-C when `when` returns; returns the exit code."""
        return self.interrupt(when, "cn", *self._options, task, **self._OFF)

    @property
    def _options(self) -> tuple[str, ...]:
        return ("-p", "--auto", "--config", str(self.config))

    _OFF: ClassVar[Mapping[str, str]] = {"CONTINUE_TELEMETRY_ENABLED": "0"}


def _text(data: str | bytes | None) -> str:
    return data.decode(errors="replace") if isinstance(data, bytes) else data or ""
