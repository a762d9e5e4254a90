"""Load generator for concurrent streams on raw sockets, run as its own process.

Reads one job as JSON from standard input and writes one list of stream records as JSON.
All times are seconds of the monotonic clock.
"""

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Job:
    """Request bodies to post at the same moment, one stream each, with a timeout."""

    host: str
    port: int
    bodies: list[dict[str, Any]]
    timeout_s: float = 600.0


@dataclass(slots=True)
class StreamRecord:
    """Record of one stream; `arrivals` are the times at which its pieces of text arrived."""

    sent_at: float = 0.0
    ended_at: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int | None = None
    finish_reason: str = ""
    error: str = ""


class PlainBody:
    """Parses server-sent events from a body that ends with the connection."""

    def __init__(self) -> None:
        self._text = b""
        self.is_complete = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Return the data lines that `data` completes."""
        self._text += data
        *events, self._text = self._text.replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            for line in event.split(b"\n"):
                if line.startswith(b"data: "):
                    yield line[6:]

    def end(self) -> None:
        """Handle the end of the connection, which ends the body."""
        self.is_complete = True


class ChunkedBody:
    """Parses server-sent events from a chunked HTTP body."""

    def __init__(self) -> None:
        self._raw = b""
        self._events = PlainBody()
        self.is_complete = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Return the data lines that `data` completes."""
        self._raw += data
        text = b""
        while not self.is_complete:
            size_text, separator, rest = self._raw.partition(b"\r\n")
            if not separator:
                break
            size = int(size_text.split(b";")[0], 16)
            if len(rest) < size + 2:
                break
            text += rest[:size]
            self._raw = rest[size + 2 :]
            self.is_complete = size == 0
        yield from self._events.feed(text)

    def end(self) -> None:
        """Handle the end of the connection.  Raises ValueError: the last chunk is missing."""
        raise ValueError("the connection closed in the middle of the answer")


async def run_job(job: Job) -> list[StreamRecord]:
    """Post all bodies at once over connections opened before the clock starts."""
    connections = [
        await asyncio.wait_for(asyncio.open_connection(job.host, job.port), CONNECT_TIMEOUT_S)
        for _ in job.bodies
    ]
    streams = [
        _stream(reader, writer, job, body)
        for (reader, writer), body in zip(connections, job.bodies, strict=True)
    ]
    return list(await asyncio.gather(*streams))


async def _stream(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, job: Job, body: dict[str, Any]
) -> StreamRecord:
    record = StreamRecord()
    lines: list[tuple[float, bytes]] = []
    try:
        async with asyncio.timeout(job.timeout_s):
            record.sent_at = time.monotonic()
            writer.write(_request(job, body))
            await _read_answer(reader, record, lines)
    except (OSError, TimeoutError, ValueError, asyncio.IncompleteReadError) as error:
        record.error = f"{type(error).__name__}: {error}"
    finally:
        writer.close()
    # Parsed after the stream has ended, so parsing does not delay arrivals.
    for arrived_at, line in lines:
        _note(record, arrived_at, line)
    if not record.error and record.completion_tokens == 0:
        record.error = "the stream ended without usage"
    return record


def _request(job: Job, body: dict[str, Any]) -> bytes:
    payload = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {job.host}:{job.port}\r\n"
        "Content-Type: application/json\r\nAccept: text/event-stream\r\n"
        f"Content-Length: {len(payload)}\r\n\r\n"
    )
    return head.encode() + payload


async def _read_answer(
    reader: asyncio.StreamReader, record: StreamRecord, lines: list[tuple[float, bytes]]
) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    status = head.split(" ", 2)[1]
    if status != "200":
        raise ValueError(f"HTTP {status}: {(await reader.read(2000)).decode(errors='replace')}")
    is_chunked = "transfer-encoding: chunked" in head.lower()
    body = ChunkedBody() if is_chunked else PlainBody()
    while not body.is_complete:
        data = await reader.read(65536)
        now = time.monotonic()
        if not data:
            body.end()
            return
        lines.extend((now, line) for line in body.feed(data))
        record.ended_at = now


def _note(record: StreamRecord, arrived_at: float, line: bytes) -> None:
    if line == b"[DONE]":
        return
    chunk = json.loads(line)
    if "error" in chunk:
        record.error = str(chunk["error"])
        return
    for choice in chunk.get("choices", []):
        if text := choice.get("delta", {}).get("content"):
            record.arrivals.append(arrived_at)
            record.text += text
        record.finish_reason = choice.get("finish_reason") or record.finish_reason
    if usage := chunk.get("usage"):
        record.prompt_tokens = usage["prompt_tokens"]
        record.completion_tokens = usage["completion_tokens"]
        details = usage.get("prompt_tokens_details") or {}
        record.cached_tokens = details.get("cached_tokens")


if __name__ == "__main__":
    records = asyncio.run(run_job(Job(**json.load(sys.stdin))))
    json.dump([asdict(record) for record in records], sys.stdout)
