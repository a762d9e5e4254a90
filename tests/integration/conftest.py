"""Servers of this tier: one for most tests, and others, one after another, with own settings."""

import shutil
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import yaml
from openai import AsyncOpenAI, OpenAI

from tests.integration.server import ROOT, Server
from tests.starter import starter_path

# Fixtures of servers that several tests share, in the order in which they run.
SHARED = ("server", "small", "converting", "doubled", "limited", "narrow")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of one server behind each other; those of F10 end it and come last."""
    items.sort(key=lambda item: (_place(item), item.name.startswith("test_f10")))


def _place(item: pytest.Item) -> int:
    used = getattr(item, "fixturenames", ())
    return next((place for place, name in enumerate(SHARED) if name in used), len(SHARED))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running server; at the end it must stop without leaving a process."""
    home = tmp_path_factory.mktemp("home")
    server = Server(home, tmp_path_factory.mktemp("models"))
    try:
        # A file that comes back is found by the next scan.
        server.start(SCAN_INTERVAL_S="15")
        yield server
        assert server.stop() == 0
        assert server.survivors() == []
    finally:
        server.kill()


class Servers:
    """Servers with settings of their own, one at a time.

    Who asks for the settings of the one that runs gets that one; a test may stop it at its end.
    """

    def __init__(self, new: Callable[[], Server]) -> None:
        self._new = new
        self._settings: object = None
        self._server: Server | None = None

    def get(
        self, *command: str, prepare: Callable[[Server], object] | None = None, **settings: str
    ) -> Server:
        """Return a running server with these settings; `prepare` sees it before it starts."""
        if (command, settings) != self._settings or self._server is None:
            self.end()
        elif self._server.is_running:
            return self._server
        else:
            self.kill()
        self._settings, self._server = (command, settings), self._new()
        if prepare is not None:
            prepare(self._server)
        self._server.start(*command, **settings)
        return self._server

    def end(self) -> None:
        """Stop what runs, which must leave no process."""
        try:
            if self._server is not None and self._server.is_running:
                assert self._server.stop() == 0
                assert self._server.survivors() == []
        finally:
            self.kill()

    def kill(self) -> None:
        """End at once what is left."""
        if self._server is not None:
            self._server.kill()
            self._server = None


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Servers with settings of their own."""

    def new() -> Server:
        return Server(tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("models"))

    servers = Servers(new)
    try:
        yield servers
        servers.end()
    finally:
        servers.kill()


@pytest.fixture
def limited(servers: Servers) -> Server:
    """A server with a key and memory for one of two models, which writes no prefixes."""

    def prepare(server: Server) -> None:
        shutil.copyfile(starter_path(), server.models / "copy-q4_1.gguf")

    return servers.get(
        prepare=prepare,
        MEMORY_BUDGET="350MiB",
        CONTEXT_LENGTH="1024",
        MAX_SEQUENCES="2",
        API_KEY="sesame",
        DRAIN_LIMIT_S="1",
        PREFIX_DISK="0",
        PREFIX_RAM="0",
    )


@pytest.fixture
def narrow(servers: Servers) -> Server:
    """A server with too little memory for the starter, whose idle formats end soon."""
    return servers.get(FORMATS="gguf,echo", FORMAT_IDLE_S="3", MEMORY_BUDGET="64MiB")


@pytest.fixture
def converting(servers: Servers) -> Server:
    """A server with too little memory for the starter in float32, which converts by itself."""
    return servers.get(
        AUTO_CONVERT="true",
        MEMORY_BUDGET="600MiB",
        CONTEXT_LENGTH="256",
        FORMATS="gguf,safetensors,mlx",
        MAX_SEQUENCES="2",
    )


@pytest.fixture(scope="session")
def two_replicas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration in which the echo format always has two replicas."""
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    content = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    scaling = {"min_replicas": 2, "initial_replicas": 2, "max_replicas": 2}
    echo = {"name": "echo", "autoscaling_config": scaling}
    content["applications"][0]["deployments"].append(echo)
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def doubled(servers: Servers, two_replicas: Path) -> Server:
    """A server with two replicas of the echo format, which waits long for its requests' ends."""
    launcher = (sys.executable, "-m", "deployments.start.launcher", str(two_replicas))
    return servers.get(*launcher, FORMATS="gguf,echo", MAX_REPLICAS="2", DRAIN_LIMIT_S="300")


@pytest.fixture
def other_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that the test starts and stops itself."""
    server = Server(tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("models"))
    yield server
    server.kill()


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    """The official client, without retries that would hide faults."""
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(server: Server) -> AsyncIterator[AsyncOpenAI]:
    """The official asynchronous client."""
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
