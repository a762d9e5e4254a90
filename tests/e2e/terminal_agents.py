"""Agents that are native programs: Codex, opencode and Claude Code."""

import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import httpx
import pytest

from tests.e2e.agents import LIMIT_S, Agent, Run, started
from tests.integration.server import wait_until
from tests.live_server import free_port

# Their prompts and a few turns fit into it.
CONTEXT_TOKENS = 60_000
OUTPUT_TOKENS = 16_000
_SYSTEMS = {"linux": "linux", "darwin": "darwin"}
_MACHINES = {"x86_64": "x64", "AMD64": "x64", "arm64": "arm64", "aarch64": "arm64"}

Native = TypeVar("Native", bound="NativeAgent")


def platform_name() -> str:
    """Return this platform as npm's packages are named: system and processor."""
    machine = platform.machine()
    return f"{_SYSTEMS.get(sys.platform, sys.platform)}-{_MACHINES.get(machine, machine)}"


class NativeAgent(Agent):
    """An agent whose program is in a package of its own for each platform."""

    def package(self) -> Path:
        """Return the folder of this platform's package, which may be absent."""
        raise NotImplementedError


def usable(agent: Native) -> Native:
    """Return the agent; the test is skipped where its package is not installed."""
    if not agent.package().is_dir():
        pytest.skip(f"{agent.package().name}: no package of this name for {platform_name()}")
    return agent


class Codex(NativeAgent):
    """Codex's command line over the Responses API, with the tools that it has by default."""

    def package(self) -> Path:
        """Return the folder of its program."""
        return self.node_modules / "@openai" / f"codex-{platform_name()}"

    def configure(
        self, model: str, mcp_servers: Mapping[str, Sequence[str]] = MappingProxyType({})
    ) -> None:
        """Write its config.toml; requests to OpenAI's own services are off.

        `mcp_servers` are the commands of MCP servers by name.
        """
        servers = (
            f"[mcp_servers.{name}]\ncommand = {json.dumps(program)}\n"
            f"args = {json.dumps(arguments)}\n"
            for name, (program, *arguments) in mcp_servers.items()
        )
        settings = self.home / ".codex" / "config.toml"
        settings.parent.mkdir(parents=True)
        settings.write_text(
            f'model = "{model}"\nmodel_provider = "local"\n'
            f"model_context_window = {CONTEXT_TOKENS}\n"
            'approval_policy = "never"\nsandbox_mode = "danger-full-access"\n'
            "check_for_update_on_startup = false\n"
            "[analytics]\nenabled = false\n[feedback]\nenabled = false\n"
            '[model_providers.local]\nname = "local"\nwire_api = "responses"\n'
            f'base_url = "{self.base_url}"\n' + "".join(servers)
        )

    def work(self, task: str) -> Run:
        """Give it a task."""
        return self.run("codex", "exec", *self._OPTIONS, task)

    def report(self, task: str, schema: Path) -> Run:
        """Give it a task whose last message matches the JSON schema in the file."""
        return self.run("codex", "exec", *self._OPTIONS, "--output-schema", str(schema), task)

    def resume(self, task: str) -> Run:
        """Give the last session another task, in a new process."""
        return self.run("codex", "exec", "resume", "--last", *self._OPTIONS, task)

    def stop_during(self, when: Callable[[], None], task: str) -> int:
        """Give it a task and press Ctrl-C when `when` returns; returns the exit code."""
        return self.interrupt(when, "codex", "exec", *self._OPTIONS, task)

    _OPTIONS = ("--json", "--skip-git-repo-check")


class OpenCode(NativeAgent):
    """opencode's command line over chat completions."""

    def package(self) -> Path:
        """Return the folder of its program; the baseline build runs on every such processor."""
        return self.node_modules / f"opencode-{platform_name()}-baseline"

    def configure(self, model: str) -> None:
        """Write its opencode.json; updates, shares and downloads are off."""
        limit = {"context": CONTEXT_TOKENS, "output": OUTPUT_TOKENS}
        provider = {
            "npm": "@ai-sdk/openai-compatible",
            "name": "Local",
            "options": {"baseURL": self.base_url, "apiKey": "any"},
            "models": {model: {"name": model, "limit": limit}},
        }
        settings = {
            "provider": {"local": provider},
            "model": f"local/{model}",
            "small_model": f"local/{model}",
            "autoupdate": False,
            "share": "disabled",
        }
        file = self.home / ".config" / "opencode" / "opencode.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(settings))

    def work(self, task: str) -> Run:
        """Give it a task."""
        return self.run("opencode", *self._RUN, "--title", "Task", task, **self._OFF)

    def report(self, task: str, schema: Mapping[str, Any]) -> dict[str, Any]:
        """Give it a task that ends in an object, over its own server; returns its last message."""
        port = free_port()
        command = (str(self._program("opencode")), "serve", "--port", str(port))
        asked = {
            "parts": [{"type": "text", "text": task}],
            "format": {"type": "json_schema", "schema": schema},
        }
        with (
            started(command, self.folder, self.home, **self._OFF),
            httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=LIMIT_S) as client,
        ):
            wait_until(lambda: _answers(client), "opencode's server answers")
            session = client.post("/session", json={"title": "Task"}).json()["id"]
            answer = client.post(f"/session/{session}/message", json=asked)
            message: dict[str, Any] = answer.raise_for_status().json()["info"]
            return message

    def resume(self, task: str) -> Run:
        """Give the last session another task, in a new process."""
        return self.run("opencode", *self._RUN, "--continue", task, **self._OFF)

    def stop_during(self, when: Callable[[], None], task: str) -> int:
        """Give it a task and press Ctrl-C when `when` returns; returns the exit code."""
        return self.interrupt(when, "opencode", *self._RUN, "--title", "Task", task, **self._OFF)

    def _program(self, name: str) -> Path:
        return self.package() / "bin" / name

    _RUN = ("run", "--format", "json", "--auto")
    _OFF: ClassVar[Mapping[str, str]] = {
        "OPENCODE_DISABLE_AUTOUPDATE": "1",
        "OPENCODE_DISABLE_MODELS_FETCH": "1",
        "OPENCODE_DISABLE_LSP_DOWNLOAD": "1",
        "OPENCODE_DISABLE_DEFAULT_PLUGINS": "1",
    }


class ClaudeCode(NativeAgent):
    """Claude Code's command line over the Messages API."""

    def package(self) -> Path:
        """Return the folder of its program."""
        return self.node_modules / "@anthropic-ai" / f"claude-code-{platform_name()}"

    def work(self, model: str, task: str) -> Run:
        """Give it a task."""
        return self.run("claude", *self._OPTIONS, task, **self._variables(model))

    def report(self, model: str, task: str, schema: Mapping[str, Any]) -> Run:
        """Give it a task that ends in an object."""
        wanted = ("--json-schema", json.dumps(schema))
        return self.run("claude", *wanted, *self._OPTIONS, task, **self._variables(model))

    def resume(self, model: str, task: str) -> Run:
        """Give the last session another task, in a new process."""
        return self.run("claude", "--continue", *self._OPTIONS, task, **self._variables(model))

    def stop_during(self, when: Callable[[], None], model: str, task: str) -> int:
        """Give it a task and press Ctrl-C when `when` returns; returns the exit code."""
        return self.interrupt(when, "claude", *self._OPTIONS, task, **self._variables(model))

    def _program(self, name: str) -> Path:
        return self.package() / name

    def _variables(self, model: str) -> dict[str, str]:
        return {
            "ANTHROPIC_BASE_URL": self.base_url.removesuffix("/v1"),
            "ANTHROPIC_AUTH_TOKEN": "any",
            "ANTHROPIC_MODEL": model,
            "ANTHROPIC_DEFAULT_HAIKU_MODEL": model,
            "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(CONTEXT_TOKENS),
            "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(OUTPUT_TOKENS),
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "DISABLE_AUTOUPDATER": "1",
            "DISABLE_TELEMETRY": "1",
            "DISABLE_ERROR_REPORTING": "1",
        }

    _OPTIONS = (
        *("--print", "--verbose", "--output-format", "stream-json"),
        *("--allowed-tools=Read,Edit,Write", "--"),
    )


def items(run: Run, kind: str) -> list[dict[str, Any]]:
    """Return the items of a kind that Codex's run completed."""
    done = [event["item"] for event in run.events if event["type"] == "item.completed"]
    return [item for item in done if item["type"] == kind]


def _answers(client: httpx.Client) -> bool:
    try:
        # opencode never answers a request that comes while it starts.
        return client.get("/session", timeout=2).is_success
    except httpx.TransportError:
        return False
