"""Agents as a user runs them in a terminal, each with a home of its own."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True, slots=True)
class Agent:
    """One agent's command line; `home` holds its settings, `folder` is what it works in."""

    node_modules: Path
    home: Path
    folder: Path
    base_url: str

    def run(self, name: str, *arguments: str, **variables: str) -> Run:
        """Run an installed command without a terminal and wait for its end."""
        command: Sequence[str] = (str(self.node_modules / ".bin" / name), *arguments)
        try:
            done = subprocess.run(
                command,
                cwd=self.folder,
                env={**self._environment(), **variables},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as late:
            said = f"{_text(late.stdout)}\n{_text(late.stderr)}"
            raise AssertionError(f"{name} did not end in {LIMIT_S:g} s:\n{said[-4000:]}") from late
        return Run(done.returncode, done.stdout, done.stderr)

    def _environment(self) -> Mapping[str, str]:
        """Return an environment without keys, proxies and settings of the person at the machine."""
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
        return {**kept, "HOME": str(self.home)}


class Cline(Agent):
    """Cline's command line."""

    def configure(self, model: str) -> None:
        """Set it up as the documentation says, its telemetry off."""
        settings = self.home / ".cline" / "data" / "settings" / "global-settings.json"
        settings.parent.mkdir(parents=True)
        choices = {
            "telemetryOptOut": True,
            "autoUpdateEnabled": False,
            "disabledTools": LEFT_OUT,
        }
        settings.write_text(json.dumps(choices))
        done = self.run("cline", *("auth", "-p", "openai", "-k", "any"), *("-m", model),
                        *("-b", self.base_url))  # fmt: skip
        assert done.code == 0, done

    def work(self, model: str, task: str) -> Run:
        """Give it a task; it runs in this one process and no daemon stays behind."""
        return self.run(
            *("cline", "-P", "openai", "-m", model, "--json", "--auto-approve", "true"),
            *("--retries", "1", task),
            CLINE_SESSION_BACKEND_MODE="local",
        )


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
        return self.run(
            *("cn", "-p", "--auto", "--config", str(self.config), task),
            CONTINUE_TELEMETRY_ENABLED="0",
        )


def _text(data: str | bytes | None) -> str:
    return data.decode(errors="replace") if isinstance(data, bytes) else data or ""
