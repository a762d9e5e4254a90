"""One real server for the whole tier; tests that need another start their own."""

from collections.abc import AsyncIterator, Iterator

import pytest
from openai import AsyncOpenAI, OpenAI

from tests.integration.server import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running server; at the end it must stop without leaving a process."""
    home = tmp_path_factory.mktemp("home")
    server = Server(home, tmp_path_factory.mktemp("models"))
    try:
        server.start()
        yield server
        assert server.stop() == 0
        assert server.survivors() == []
    finally:
        server.kill()


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
