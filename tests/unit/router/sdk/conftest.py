"""A client of an application whose answers are scripted."""

from collections.abc import AsyncIterator

import httpx
import pytest

from router.app import create_app
from tests.fakes import FakeDispatcher
from tests.live_server import client_of
from tests.sdk.scripted_answers import services_of


@pytest.fixture
def dispatcher() -> FakeDispatcher:
    return FakeDispatcher()


@pytest.fixture
async def client(dispatcher: FakeDispatcher) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(create_app(services_of(dispatcher))) as one:
        yield one
