"""One server for the tier, with the scripted format beside the real one, and agents to run."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import httpx
import pytest

from backends.engine.threads import performance_cores
from scripts.install import ROOT
from scripts.install_clients import ClientsUnavailable, clients_folder, python_client
from tests.e2e.agents import Cline, Continue
from tests.e2e.record import Record
from tests.e2e.scripted import (
    PLANS_VARIABLE,
    RECORD_VARIABLE,
    SMALL,
    SMALL_VARIABLE,
    Turn,
    write_distribution,
)
from tests.e2e.sdk import SCRIPTS, Sdk, beside_packages
from tests.e2e.small_model import write_small_model
from tests.e2e.terminal_agents import ClaudeCode, Codex, OpenCode, usable
from tests.gguf_files import minilm_gguf
from tests.integration.server import Server, wait_until

WritePlan: TypeAlias = Callable[[str, Sequence[Turn]], None]
MakeSdk: TypeAlias = Callable[..., Sdk]


@pytest.fixture(scope="session")
def node_modules() -> Path:
    """Where the agents are installed; skipped with the reason where there is no Node.js."""
    try:
        return clients_folder() / "node_modules"
    except ClientsUnavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def plans_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plans that the scripted model reads at every request."""
    path = tmp_path_factory.mktemp("plans") / "plans.json"
    path.write_text("{}")
    return path


@pytest.fixture(scope="session")
def record_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the scripted models note of every request."""
    path = tmp_path_factory.mktemp("record") / "record.jsonl"
    path.write_text("")
    return path


@pytest.fixture(scope="session")
def server(
    plans_file: Path, record_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server in whose environment the scripted format is an installed plug-in."""
    plugins = tmp_path_factory.mktemp("plugins")
    small = write_small_model(tmp_path_factory.mktemp("small") / "small.gguf")
    write_distribution(plugins)
    path = os.pathsep.join([str(plugins), str(ROOT), *_python_path()])
    server = Server(tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("models"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        patch.setenv(PLANS_VARIABLE, str(plans_file))
        patch.setenv(RECORD_VARIABLE, str(record_file))
        patch.setenv(SMALL_VARIABLE, str(small))
        try:
            # An agent waits while its prompt is computed, so that every core is free for that.
            server.start(FORMATS="gguf,scripted-gguf", THREADS=str(performance_cores()))
            yield server
            assert server.stop() == 0
            assert server.survivors() == []
        finally:
            server.kill()


@pytest.fixture(scope="session")
def embedding_model(server: Server) -> str:
    """A model of texts' vectors that the server finds in its folder; its name."""
    minilm_gguf(server.models / "all-MiniLM-L6-v2-F32.gguf")
    return "all-minilm-l6-v2"


@pytest.fixture
def plan(plans_file: Path) -> Iterator[WritePlan]:
    """Lays down what the model says when a user's message holds a key."""
    plans: dict[str, Sequence[Turn]] = {}

    def write(key: str, turns: Sequence[Turn]) -> None:
        plans[key] = turns
        plans_file.write_text(json.dumps(plans))

    yield write
    plans_file.write_text("{}")


@pytest.fixture
def record(record_file: Path) -> Record:
    """The requests with a plan that this test's client sends."""
    record_file.write_text("")
    return Record(record_file)


@pytest.fixture
def answering(server: Server) -> Callable[[], None]:
    """Returns as soon as the small model computes an answer."""

    def is_running() -> bool:
        running = [
            float(line.rpartition(" ")[2])
            for line in httpx.get(f"{server.url}/metrics", timeout=30).text.splitlines()
            if line.startswith("impetus_engine_running_sequences{") and SMALL in line
        ]
        return any(running)

    return lambda: wait_until(is_running, f"{SMALL} answers", 120)


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A small project with one file to change."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "greet.py").write_text('def greet():\n    return "hello"\n')
    return folder


@pytest.fixture
def cline(node_modules: Path, server: Server, tmp_path: Path, workspace: Path) -> Cline:
    """Cline, not set up yet."""
    return Cline(node_modules, tmp_path / "home", workspace, f"{server.url}/v1")


@pytest.fixture
def continue_cli(node_modules: Path, server: Server, tmp_path: Path, workspace: Path) -> Continue:
    """Continue, not set up yet."""
    return Continue(node_modules, tmp_path / "home", workspace, f"{server.url}/v1")


@pytest.fixture
def codex(node_modules: Path, server: Server, tmp_path: Path, workspace: Path) -> Codex:
    """Codex, not set up yet; skipped with the reason where it does not run."""
    return usable(Codex(node_modules, tmp_path / "home", workspace, f"{server.url}/v1"))


@pytest.fixture
def opencode(node_modules: Path, server: Server, tmp_path: Path, workspace: Path) -> OpenCode:
    """opencode, not set up yet; skipped with the reason where it does not run."""
    return usable(OpenCode(node_modules, tmp_path / "home", workspace, f"{server.url}/v1"))


@pytest.fixture
def claude_code(node_modules: Path, server: Server, tmp_path: Path, workspace: Path) -> ClaudeCode:
    """Claude Code; skipped with the reason where it does not run."""
    return usable(ClaudeCode(node_modules, tmp_path / "home", workspace, f"{server.url}/v1"))


@pytest.fixture
def sdk(server: Server, tmp_path: Path, workspace: Path) -> MakeSdk:
    """Makes a Python client of a script's name and its environment's."""

    def make(script: str, environment: str = "python") -> Sdk:
        python = python_client(environment)
        return Sdk(python, SCRIPTS / script, tmp_path / "home", workspace, f"{server.url}/v1")

    return make


@pytest.fixture
def ai_sdk(node_modules: Path, server: Server, tmp_path: Path, workspace: Path) -> Sdk:
    """The AI SDK."""
    node = shutil.which("node")
    assert node is not None
    script = beside_packages(SCRIPTS / "run_ai_sdk.mjs", node_modules, tmp_path / "script")
    return Sdk(Path(node), script, tmp_path / "home", workspace, f"{server.url}/v1")


@pytest.fixture
def answered(server: Server) -> Callable[[], Mapping[str, int]]:
    """Tells how many answers the API gave since the test began, by status."""
    before = _answers(server)

    def since() -> Mapping[str, int]:
        now = _answers(server)
        counts = {status: count - before.get(status, 0) for status, count in now.items()}
        return {status: count for status, count in counts.items() if count}

    return since


def _answers(server: Server) -> dict[str, int]:
    counts: dict[str, int] = {}
    for line in httpx.get(f"{server.url}/metrics", timeout=30).text.splitlines():
        head, _, value = line.rpartition(" ")
        if head.startswith("impetus_requests_total{") and 'endpoint="/v1/' in head:
            status = head.partition('status="')[2].partition('"')[0]
            counts[status] = counts.get(status, 0) + int(float(value))
    return counts


def _python_path() -> list[str]:
    return [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
