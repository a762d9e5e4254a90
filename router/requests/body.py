"""Reads, parses and validates JSON request bodies; large ones away from the event loop."""

import asyncio
import gc
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request

from core.errors import RequestError, Unavailable
from core.text import escaped
from core.units import MIB, format_bytes
from router.requests.fields import RequestBody
from router.requests.json_pieces import SMALL_BYTES, free, is_small, parse_json

Body = TypeVar("Body", bound=RequestBody)
Converted = TypeVar("Converted")

# Bytes of large bodies that are received or parsed at the same time, by all requests together.
_MAX_BUFFERED = 256 * MIB


class _Buffered:
    """Counts the bytes of large bodies between their arrival and the end of their parsing."""

    def __init__(self) -> None:
        self.total = 0

    def check(self, own: int) -> None:
        """Raise Unavailable if the bodies of other requests leave no room for this one."""
        if self.total > _MAX_BUFFERED and self.total > own:
            raise Unavailable(
                f"Requests with more than {format_bytes(_MAX_BUFFERED)} in total are being read; "
                "send it again.",
                retry_after_s=1,
            )


buffered = _Buffered()


@lru_cache(maxsize=1)
def _parser_thread() -> ThreadPoolExecutor:
    # One thread: more would only compete for the same lock, and delay the event loop.
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="json")


# Fields that may hold most of a body's objects.
_LISTS = ("messages", "input", "documents", "prompt", "tools")


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause the cyclic garbage collector, which would stop all threads to find none in JSON."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def read_request(
    request: Request, model: type[Body], convert: Callable[[Body], Converted]
) -> tuple[Body, Converted]:
    """Read and validate the body; return it, and what `convert` makes of it.

    A large body is parsed, validated and converted by a thread, so that streams of other requests
    go on; its messages or input are empty afterwards, so `convert` must take what it needs.
    Raises RequestError, UnsupportedParameter, BodyTooLarge, what `convert` raises, and
    Unavailable if other requests' bodies fill the buffers.
    """

    def parse() -> tuple[Body, Converted]:
        parsed = parse_request(b"".join(chunks), model)
        return parsed, convert(parsed)

    def parse_large() -> tuple[Body, Converted]:
        with _collector_paused():
            data = parse_json(b"".join(chunks))
            try:
                parsed = validate_request(data, model)
            finally:
                free(data.get(name) for name in _LISTS)
            try:
                return parsed, convert(parsed)
            finally:
                free(getattr(parsed, name, None) for name in ("messages", "input"))

    chunks: list[bytes] = []
    counted = 0
    try:
        async for chunk in request.stream():
            chunks.append(chunk)
            size = counted + len(chunk)
            buffered.total += size - counted
            counted = size
            if counted > SMALL_BYTES:
                buffered.check(counted)
        if counted <= SMALL_BYTES and is_small(b"".join(chunks)):
            return parse()
        return await asyncio.get_running_loop().run_in_executor(_parser_thread(), parse_large)
    except ClientDisconnect as error:
        raise RequestError("The client disconnected before its request was complete.") from error
    finally:
        chunks.clear()
        buffered.total -= counted


def parse_request(body: bytes, model: type[Body]) -> Body:
    """Validate `body`.

    Strict JSON: no duplicate keys, NaN, byte order mark, or nesting over 200.  Lone surrogates
    become U+FFFD.
    Raises RequestError naming the field, UnsupportedParameter, UnsupportedCapability.
    """
    return validate_request(parse_json(body), model)


def validate_request(data: dict[str, Any], model: type[Body]) -> Body:
    """Validate parsed JSON.  Raises as `parse_request` does."""
    model.check_counts(data)
    try:
        parsed = model.model_validate(data)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False, include_context=False)
        # Of a union's members, report the one that validated furthest.
        nearest = max(errors, key=lambda one: len(one["loc"]))
        param = _param(nearest["loc"])
        message = escaped(nearest["msg"].removeprefix("Value error, "))
        raise RequestError(f"{param}: {message}" if param else message, param=param) from error
    parsed.refuse_unsupported()
    return parsed


def _param(location: Iterable[int | str]) -> str | None:
    """Return `messages[0].content` for pydantic's location, without the union members' names."""
    param = ""
    for part in location:
        if isinstance(part, int):
            param += f"[{part}]"
        elif part not in ("str", "int") and "[" not in part:
            shown = escaped(part, 64)
            param += f".{shown}" if param else shown
    return escaped(param) or None
