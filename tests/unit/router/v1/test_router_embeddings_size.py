"""Large embedding answers: streamed in parts, between which other requests get their turn."""

import asyncio
import base64
import json

import numpy as np
import pytest

from router.app import create_app
from tests.fakes import CHAT_MODEL, EMBEDDING_MODEL, FakeDispatcher, make_services
from tests.live_server import client_of, connection, post_bytes, serving, until

INPUTS = 2048
SIZE = 512


def dispatcher_of(inputs: int, size: int) -> FakeDispatcher:
    dispatcher = FakeDispatcher()
    dispatcher.vectors = np.random.default_rng(1).standard_normal((inputs, size), np.float32)
    return dispatcher


@pytest.mark.parametrize("encoding", ["float", "base64"])
@pytest.mark.parametrize("inputs", [1, 3, INPUTS])
async def test_vectors_arrive_exactly_whatever_their_number(encoding: str, inputs: int) -> None:
    dispatcher = dispatcher_of(inputs, SIZE)
    body = {"model": EMBEDDING_MODEL, "input": ["x"] * inputs, "encoding_format": encoding}
    async with client_of(create_app(make_services(dispatcher))) as http:
        response = await http.post("/v1/embeddings", json=body)
    assert response.status_code == 200
    assert ("content-length" in response.headers) == (inputs < INPUTS)
    answer = json.loads(response.content)
    assert (answer["object"], answer["model"]) == ("list", EMBEDDING_MODEL)
    assert answer["usage"] == {"prompt_tokens": 5, "total_tokens": 5, "truncated_tokens": 0}
    assert [one["index"] for one in answer["data"]] == list(range(inputs))
    for one, vector in zip(answer["data"], dispatcher.vectors, strict=True):
        value = one["embedding"]
        if encoding == "base64":
            assert base64.b64decode(value) == vector.astype("<f4").tobytes()
        else:
            assert np.array_equal(np.asarray(value, np.float32), vector)


async def test_other_requests_are_answered_in_the_middle_of_it() -> None:
    app = create_app(make_services(dispatcher_of(INPUTS, 64 * SIZE)))
    body = {"model": EMBEDDING_MODEL, "input": ["x"] * INPUTS}
    async with serving(app) as port, connection(port) as (reader, writer):
        # The client reads the beginning only, so the answer cannot be complete.
        writer.write(post_bytes("/v1/embeddings", body))
        await until(reader, b'"embedding":[')
        async with client_of(app) as http:
            chat = {"model": CHAT_MODEL, "messages": [{"role": "user", "content": "hi"}]}
            response = await asyncio.wait_for(http.post("/v1/chat/completions", json=chat), 30)
    assert response.status_code == 200
