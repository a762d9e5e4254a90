"""The size limit of messages between processes, and what a client sees over it."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc  # type: ignore[import-untyped]
import pytest

from core.errors import BodyTooLarge
from core.settings import Settings
from core.units import MIB
from deployments.serve import message_size
from deployments.serve.handles import call, unwrap
from deployments.serve.message_size import message_limit, runtime_env_options
from deployments.start.environment import ROOT, environment

LIMIT = 1000


@asynccontextmanager
async def answering_twice_the_size() -> AsyncIterator[Any]:
    """Yield a call over a gRPC channel as Serve makes it, limited to 1,000 bytes each way."""

    async def answer(request: bytes, context: Any) -> bytes:
        del context
        return request * 2

    options = [("grpc.max_receive_message_length", LIMIT)]
    server = grpc.aio.server(options=options)
    handler = grpc.method_handlers_generic_handler(
        "test.Echo", {"Call": grpc.unary_unary_rpc_method_handler(answer)}
    )
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            yield channel.unary_unary("/test.Echo/Call")
    finally:
        await server.stop(None)


@pytest.mark.parametrize(
    ("size", "numbers"), [(5000, "request takes 4.9 KiB"), (700, "answer takes 1.4 KiB")]
)
async def test_oversized_messages_are_413_with_both_numbers(size: int, numbers: str) -> None:
    async with answering_twice_the_size() as send:
        assert await call(send(b"x" * 100)) == b"x" * 200
        with pytest.raises(BodyTooLarge, match=numbers) as raised:
            await call(send(b"x" * size))
    assert raised.value.status == 413
    assert "1000 B" in raised.value.message


def test_other_errors_are_kept() -> None:
    problem = RuntimeError("something else")
    assert unwrap(problem) is problem


def test_a_message_may_hold_any_accepted_body_and_the_largest_embeddings() -> None:
    embeddings = 2048 * 16_384 * 4
    assert message_limit(Settings()) >= max(Settings().max_body * 4, embeddings)
    assert message_limit(Settings(max_body=100 * MIB)) == 400 * MIB
    assert message_limit(Settings(max_body=2**40)) == 2**31 - 1


def test_the_launcher_and_scripts_env_raise_serves_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.delenv(message_size.VARIABLE, raising=False)
    settings = Settings(home=tmp_path)
    lines = (ROOT / "scripts" / "env").read_text().splitlines()
    assert f"{message_size.VARIABLE}={message_limit(settings)}" in lines
    larger = settings.model_copy(update={"max_body": 100 * MIB})
    assert environment(larger)[message_size.VARIABLE] == str(400 * MIB)


@pytest.mark.parametrize("value", [None, "4194304", "much"])
def test_replicas_get_the_limit_where_the_environment_lacks_it(
    monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv(message_size.VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(message_size.VARIABLE, value)
    variables = runtime_env_options(Settings())["runtime_env"]["env_vars"]
    assert variables == {message_size.VARIABLE: str(message_limit(Settings()))}
    monkeypatch.setenv(message_size.VARIABLE, str(2**31 - 1))
    assert runtime_env_options(Settings()) == {}


def test_serve_reads_this_variable() -> None:
    from ray.serve._private import constants

    expected = int(os.environ.get(message_size.VARIABLE, 4 * MIB))
    assert expected == constants.RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH
