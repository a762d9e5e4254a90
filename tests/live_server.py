"""A real uvicorn listener on a free loopback port, and raw bytes to throw at it."""

import asyncio
import json
import random
import socket
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp

from router.http.protocol import HttpProtocol
from tests.sdk.described import CheckedTransport

# Longer than the server keeps an idle connection, whose end some tests wait for.
_LIMIT_S = 30.0
# Below the ports that Linux and macOS give to connections and to Ray's processes.
_PORTS = range(20000, 32000)
_given: set[int] = set()


def free_port() -> int:
    """Return a port that nobody listens on, and that the system gives to nobody until it is used.

    A port that the system chose could be that of another process a moment later.
    """
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        if port not in _given:
            with socket.socket() as probe:
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError:
                    continue
            _given.add(port)
            return port
    raise AssertionError("no port is free")


@asynccontextmanager
async def serving(
    app: ASGIApp, *, protocol: type[HttpProtocol] = HttpProtocol
) -> AsyncGenerator[int, None]:
    """Serve `app` and give the port."""
    config = uvicorn.Config(
        app, http=protocol, lifespan="off", log_config=None, proxy_headers=False, ws="none"
    )
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        await server.startup(sockets=[listener])
        try:
            yield listener.getsockname()[1]
        finally:
            await server.shutdown(sockets=[listener])


@asynccontextmanager
async def connection(
    port: int,
) -> AsyncGenerator[tuple[asyncio.StreamReader, asyncio.StreamWriter], None]:
    """Open a TCP connection with a small receive buffer."""
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.setblocking(False)
    await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=raw, limit=1024)
    try:
        yield reader, writer
    finally:
        writer.close()
        try:
            await writer.wait_closed()
        except ConnectionError:
            pass


async def exchange(port: int, request: bytes) -> tuple[int, bytes]:
    """Send raw bytes, return the status and everything that came back."""
    async with connection(port) as (reader, writer):
        writer.write(request)
        answer = b""
        try:
            while data := await asyncio.wait_for(reader.read(65536), _LIMIT_S):
                answer += data
        except ConnectionError:
            pass
    return int(answer.split(b" ", 2)[1]), answer


def post_bytes(path: str, body: Mapping[str, Any], *, host: str = "127.0.0.1") -> bytes:
    """Return a raw JSON POST."""
    payload = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\n\r\n"
    )
    return head.encode() + payload


def client_of(app: FastAPI, **headers: str) -> httpx.AsyncClient:
    """Return a client that calls `app` in process; its answers must be as described."""
    return httpx.AsyncClient(
        transport=CheckedTransport(app), base_url="http://localhost:8000", headers=headers
    )


def sse_data(text: str) -> list[Any]:
    """Return the parsed data lines of a stream that ended with `[DONE]`."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data:")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def error_of(response: httpx.Response) -> dict[str, Any]:
    """Return the error of a response, having checked that the envelope is exact."""
    body: dict[str, dict[str, Any]] = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"].startswith("req_")
    return body["error"]


async def until(reader: asyncio.StreamReader, mark: bytes) -> bytes:
    """Return everything up to `mark`."""
    return await asyncio.wait_for(reader.readuntil(mark), _LIMIT_S)


async def to_end(reader: asyncio.StreamReader) -> bytes:
    """Return everything up to the end of the connection."""
    return await asyncio.wait_for(reader.read(), _LIMIT_S)


async def count_to_end_or_reset(reader: asyncio.StreamReader) -> int:
    count = 0
    try:
        while data := await asyncio.wait_for(reader.read(65536), _LIMIT_S):
            count += len(data)
    except ConnectionError:
        pass
    return count
