"""`POST /v1/embeddings`: request, handler and answer."""

import asyncio
import base64
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from openai.types.create_embedding_response import Usage
from pydantic import Field, PlainValidator
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from core.errors import EngineFailed
from core.types import Capability, EmbeddingParams, Embeddings, Truncation
from core.types import Usage as TokenUsage
from router.answers.event_feed import unless_disconnected
from router.answers.generation import client_closed_response
from router.context import RouteContext, record_of
from router.requests.body import read_request
from router.requests.fields import (
    RequestBody,
    TokenCount,
    parse_inputs,
)
from router.requests.priority import request_priority

MAX_EMBEDDING_INPUTS = 2048
MAX_NAME_CHARACTERS = 64
_SIDES: Mapping[str, Truncation] = {"none": "none", "start": "start", "end": "end"}
# Larger answers are streamed, so that they never are in memory as a whole.
_MAX_COLLECTED_BYTES = 1 << 20
_PART_BYTES = 1 << 16


def parse_embedding_input(value: object) -> tuple[str | tuple[int, ...], ...]:
    """Return the inputs of an embedding request; raises ValueError."""
    inputs = parse_inputs(value)
    if len(inputs) > MAX_EMBEDDING_INPUTS:
        raise ValueError(f"has {len(inputs)} inputs; at most {MAX_EMBEDDING_INPUTS} are accepted")
    empty = next((index for index, each in enumerate(inputs) if not each), None)
    if empty is not None:
        raise ValueError(f"the input at index {empty} is empty; remove it")
    return inputs


def parse_truncate(value: object) -> Truncation | None:
    """Return which end is cut, for a boolean or "NONE", "START", "END"; raises ValueError.

    Source: the boolean is text-embeddings-inference's, the names are Cohere's and NVIDIA's.
    """
    if value is None:
        return None
    if isinstance(value, bool):
        return "default" if value else "none"
    side = _SIDES.get(value.lower()) if isinstance(value, str) else None
    if side is None:
        raise ValueError('must be true, false, "NONE", "START" or "END"')
    return side


class EmbeddingRequest(RequestBody):
    """Body of `POST /v1/embeddings`."""

    generates: ClassVar = False

    input: Annotated[tuple[str | tuple[int, ...], ...], PlainValidator(parse_embedding_input)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: TokenCount | None = None
    truncate: Annotated[Truncation | None, PlainValidator(parse_truncate)] = None
    prompt_name: Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARACTERS)] | None = None
    input_type: Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARACTERS)] | None = None

    def params(self, *, truncates: bool) -> EmbeddingParams:
        """Return how the inputs are prepared; `truncates` holds where the request does not say."""
        return EmbeddingParams(
            truncate=self.truncate or ("default" if truncates else "none"),
            prompt_name=self.prompt_name,
            input_type=self.input_type,
            dimensions=self.dimensions,
        )


def embedding_endpoint(context: RouteContext) -> Callable[[Request], Awaitable[Response]]:
    """Return the handler."""

    async def create_embeddings(request: Request) -> Response:
        body, ignored = await read_request(request, EmbeddingRequest, RequestBody.ignored_names)
        view = await context.model(body.model, Capability.EMBEDDING, record_of(request.scope))
        priority = request_priority(request, None, view)
        deadline_s = context.services.settings.request_timeout_s
        params = body.params(truncates=context.services.settings.truncate_inputs)
        embeddings = await unless_disconnected(
            context.services.dispatcher.embed(view.id, body.input, priority, deadline_s, params),
            request.receive,
        )
        if embeddings is None:
            return client_closed_response()
        _check(embeddings, len(body.input))
        context.metrics.count_usage(view.id, TokenUsage(embeddings.prompt_tokens, 0))
        parts = _parts(embeddings, view.id, is_base64=body.encoding_format == "base64")
        headers = context.ignored.report(ignored)
        if embeddings.vectors.nbytes > _MAX_COLLECTED_BYTES:
            return StreamingResponse(parts, headers=headers, media_type="application/json")
        content = b"".join([part async for part in parts])
        return Response(content, headers=headers, media_type="application/json")

    return create_embeddings


def _check(embeddings: Embeddings, count: int) -> None:
    vectors = embeddings.vectors
    if vectors.ndim != 2 or len(vectors) != count:
        raise EngineFailed(f"The model returned {len(vectors)} vectors for {count} inputs.")
    if not np.isfinite(vectors).all():
        raise EngineFailed("The model returned non-finite vectors (NaN or infinity).")


async def _parts(
    embeddings: Embeddings, model_id: str, *, is_base64: bool
) -> AsyncGenerator[bytes, None]:
    """Yield the answer in parts; between two vectors other requests get their turn."""
    usage = Usage(
        prompt_tokens=embeddings.prompt_tokens,
        total_tokens=embeddings.prompt_tokens,
        truncated_tokens=embeddings.truncated_tokens,
    )
    part = bytearray(b'{"object":"list","data":[')
    # Built by hand: openai's type has no base64, and validating each number is slow.
    for index, vector in enumerate(embeddings.vectors):
        value = _base64(vector) if is_base64 else vector.tolist()
        part += b"," if index else b""
        part += to_json({"object": "embedding", "index": index, "embedding": value})
        if len(part) > _PART_BYTES:
            yield bytes(part)
            part.clear()
        await asyncio.sleep(0)
    rest = to_json({"model": model_id, "usage": usage.model_dump()})
    yield bytes(part) + b"]," + rest[1:]


def _base64(vector: NDArray[np.float32]) -> str:
    """Return a vector as OpenAI encodes it: little-endian float32."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
