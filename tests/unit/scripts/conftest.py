"""A home and a server of their own for the tests of `scripts/connect`."""

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from router.clients.check import Outcome
from router.clients.clients import CLIENTS
from scripts.connect_lib import __main__ as connect

Entry: TypeAlias = Callable[..., dict[str, Any]]
# Each moves a client's files elsewhere.
VARIABLES: Sequence[str] = (
    *("CLINE_DATA_DIR", "CLINE_DIR", "CONTINUE_GLOBAL_DIR", "CLAUDE_CONFIG_DIR", "LLM_USER_PATH"),
    *("CODEX_HOME", "OPENCODE_CONFIG", "OPENCODE_CONFIG_DIR", "XDG_CONFIG_HOME"),
    *("COPILOT_HOME", "COPILOT_PROVIDERS_CONFIG", "FLATPAK_XDG_CONFIG_HOME"),
    *("VSCODE_PORTABLE", "VSCODE_APPDATA", "IMPETUS_API_KEY"),
)


def checks_with(*outcomes: Outcome) -> Callable[..., AsyncGenerator[Outcome, None]]:
    """Return a stand-in of `run_checks` with these outcomes."""

    async def run(*_: object) -> AsyncGenerator[Outcome, None]:
        for outcome in outcomes:
            yield outcome

    return run


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, as on Linux."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    return tmp_path


@pytest.fixture
def entry() -> Entry:
    """Makes an entry of `/v1/models`."""

    def make(model_id: str, level: str = "ok", **changes: Any) -> dict[str, Any]:
        fit = {"level": level, "reasons": [] if level == "ok" else ["for a reason"]}
        return {
            "id": model_id,
            "max_model_len": 32_768,
            "capabilities": ["chat", "completion", "infill", "tools"],
            "parameters": 7_000_000_000,
            "compatibility": dict.fromkeys(CLIENTS, fit),
            **changes,
        }

    return make


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch, entry: Entry) -> list[Mapping[str, Any]]:
    """A server that lists one model and passes every check."""
    listed: list[Mapping[str, Any]] = [entry("coder@gguf-q4_0", aliases=["coder"])]
    monkeypatch.setattr(connect, "list_models", lambda _: listed)
    monkeypatch.setattr(connect, "run_checks", checks_with(Outcome("stream")))
    return listed
