"""`POST /v1/rerank`, also as `/v2/rerank` and `/rerank`: request, handler and answer.

Source of the fields: the rerank APIs of Jina (v1) and Cohere (v1 and v2).
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PlainValidator
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from core.errors import EngineFailed
from core.types import Capability, JsonValue, Relevance, RerankInputs, Truncation
from core.types import Usage as TokenUsage
from router.answers.event_feed import unless_disconnected
from router.answers.generation import client_closed_response
from router.context import RouteContext, record_of
from router.requests.body import read_request
from router.requests.fields import RequestBody, TokenCount
from router.requests.limits import MAX_DOCUMENTS
from router.requests.priority import request_priority
from router.v1.embeddings import parse_truncate

PATHS = ("/v1/rerank", "/v2/rerank", "/rerank")


def parse_query(value: object) -> str:
    """Return the query of a string or an object with `text`; raises ValueError."""
    text = _text(value)
    if not text:
        raise ValueError("must be a text, or an object with a text, and not empty")
    return text


def parse_documents(value: object) -> tuple[str, ...]:
    """Return the documents of a list of strings or objects with `text`; raises ValueError."""
    if not isinstance(value, list) or not value:
        raise ValueError("must be a list of texts, or of objects with a text, and not empty")
    if len(value) > MAX_DOCUMENTS:
        raise ValueError(f"has {len(value)} documents; at most {MAX_DOCUMENTS} are accepted")
    texts = [_text(document) for document in value]
    for index, text in enumerate(texts):
        if text is None:
            raise ValueError(f"document {index} is neither a text nor an object with a text")
    return tuple(text for text in texts if text is not None)


def _text(value: object) -> str | None:
    text = value.get("text") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


class RerankRequest(RequestBody):
    """Body of `POST /v1/rerank`."""

    generates: ClassVar = False

    unsupported: ClassVar[Mapping[str, tuple[JsonValue, ...]]] = {
        "rank_fields": (["text"],),
        "return_embeddings": (False,),
    }
    # Documents are cut to the model's limit, not split into chunks.
    harmless: ClassVar[frozenset[str]] = frozenset({"max_chunks_per_doc"})

    query: Annotated[str, PlainValidator(parse_query)]
    documents: Annotated[tuple[str, ...], PlainValidator(parse_documents)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool | None = None
    max_tokens_per_doc: TokenCount | None = None
    truncate: Annotated[Truncation | None, PlainValidator(parse_truncate)] = None

    def inputs(self, *, truncates: bool) -> RerankInputs:
        """Return what is scored; `truncates` holds where the request does not say."""
        is_truncated = truncates if self.truncate is None else self.truncate != "none"
        return RerankInputs(self.query, self.documents, is_truncated, self.max_tokens_per_doc)


def rerank_endpoint(context: RouteContext) -> Callable[[Request], Awaitable[Response]]:
    """Return the handler of all paths."""

    async def rerank(request: Request) -> Response:
        body, ignored = await read_request(request, RerankRequest, RequestBody.ignored_names)
        record = record_of(request.scope)
        view = await context.model(body.model, Capability.RERANK, record)
        priority = request_priority(request, None, view)
        settings = context.services.settings
        inputs = body.inputs(truncates=settings.truncate_inputs)
        relevance = await unless_disconnected(
            context.services.dispatcher.rerank(
                view.id, inputs, priority, settings.request_timeout_s
            ),
            request.receive,
        )
        if relevance is None:
            return client_closed_response()
        scores = _checked(relevance, len(inputs.documents))
        context.metrics.count_usage(view.id, TokenUsage(relevance.prompt_tokens, 0))
        answer = {
            "id": f"rerank-{record.suffix}",
            "object": "list",
            "model": view.id,
            "results": _results(scores, body),
            **_usage(relevance, version="2" if request.url.path.startswith("/v2/") else "1"),
        }
        headers = context.ignored.report(ignored)
        return Response(to_json(answer), headers=headers, media_type="application/json")

    return rerank


def _checked(relevance: Relevance, count: int) -> NDArray[np.float32]:
    scores = relevance.scores
    if scores.shape != (count,):
        raise EngineFailed(f"The model returned {scores.size} scores for {count} documents.")
    if not np.isfinite(scores).all():
        raise EngineFailed("The model returned non-finite scores (NaN or infinity).")
    return scores


def _results(scores: NDArray[np.float32], body: RerankRequest) -> list[dict[str, Any]]:
    """Return the best documents, the best first; equal ones in the order of the request."""
    best = np.argsort(-scores, kind="stable")[: body.top_n]
    results: list[dict[str, Any]] = []
    for index in best.tolist():
        result: dict[str, Any] = {"index": index, "relevance_score": float(scores[index])}
        if body.return_documents:
            result["document"] = {"text": body.documents[index]}
        results.append(result)
    return results


def _usage(relevance: Relevance, *, version: str) -> dict[str, Any]:
    """Return the token counts in the forms of Jina (`usage`) and Cohere (`meta`)."""
    tokens = relevance.prompt_tokens
    return {
        "usage": {
            "prompt_tokens": tokens,
            "total_tokens": tokens,
            "truncated_tokens": relevance.truncated_tokens,
        },
        "meta": {
            "api_version": {"version": version},
            "billed_units": {"search_units": 1},
            "tokens": {"input_tokens": tokens, "output_tokens": 0},
        },
    }
