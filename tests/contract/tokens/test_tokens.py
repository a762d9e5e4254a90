"""The same weights give the same greedy tokens in every full-precision format."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from backends.base import Engine
from core.types import TokenPrompt
from tests.contract.conftest import OPTIONS
from tests.golden import reference
from tests.models import FULL_PRECISION, open_variant
from tests.requests import end_of, request, run, token_ids_of

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def engine(variant: str) -> AsyncIterator[Engine]:
    """An engine of its own: near ties would fall otherwise after a prefix of another test."""
    engine = open_variant(variant, OPTIONS)
    yield engine
    await engine.close()


@pytest.mark.parametrize("variant", FULL_PRECISION, scope="session", indirect=True)
@pytest.mark.parametrize("number", range(3))
async def test_greedy_tokens_are_those_of_the_reference(engine: Engine, number: int) -> None:
    wanted = reference()
    events = await run(engine, request(TokenPrompt(wanted.ids[number]), max_tokens=32))
    tokens = token_ids_of(events)
    # The reference goes on after an end token, an engine does not.
    assert tokens == wanted.tokens[number].first(len(tokens))
    assert len(tokens) == 32 or end_of(events).reason == "stop"
