"""The table of routes that answer with models: OpenAI's, Anthropic's and llama.cpp's paths."""

from collections.abc import Sequence
from functools import partial

from router.context import RouteContext
from router.http.access import Access
from router.requests.strict_body import EmptyBody
from router.route import Route
from router.v1.chat.endpoint import chat_endpoint
from router.v1.chat.request import ChatRequest
from router.v1.completions import CompletionRequest, completion_endpoint
from router.v1.embeddings import EmbeddingRequest, embedding_endpoint
from router.v1.messages.endpoints import count_tokens_endpoint, messages_endpoint
from router.v1.messages.request import MessagesPromptRequest, MessagesRequest
from router.v1.messages.threads import ThreadStore
from router.v1.models import model_endpoint, models_endpoint
from router.v1.rerank import PATHS as RERANK_PATHS
from router.v1.rerank import RerankRequest, rerank_endpoint
from router.v1.responses.endpoints import input_tokens_endpoint, responses_endpoint
from router.v1.responses.request import ResponsesRequest
from router.v1.responses.store import ResponseStore
from router.v1.responses.stored import (
    cancel_response_endpoint,
    delete_response_endpoint,
    input_items_endpoint,
    stored_response_endpoint,
)
from router.v1.tokenize import (
    DetokenizeRequest,
    TemplateRequest,
    TokenizeRequest,
    detokenize_endpoint,
    template_endpoint,
    tokenize_endpoint,
)

_read = partial(Route, Access.INFERENCE, "GET")
_post = partial(Route, Access.INFERENCE, "POST")
_delete = partial(Route, Access.INFERENCE, "DELETE")


def inference_routes(context: RouteContext) -> Sequence[Route]:
    """Return the routes, the most used first: they are tried in this order."""
    settings = context.services.settings
    threads = ThreadStore(
        max_count=settings.stored_responses, max_bytes=settings.stored_responses_bytes
    )
    messages = messages_endpoint(context, threads)
    count_tokens = count_tokens_endpoint(context, threads)
    return [
        _post("/v1/chat/completions", chat_endpoint(context), body=ChatRequest),
        _post("/v1/completions", completion_endpoint(context), body=CompletionRequest),
        _post("/v1/messages", messages, body=MessagesRequest),
        _post("/v1/embeddings", embedding_endpoint(context), body=EmbeddingRequest),
        *(
            _post(path, rerank_endpoint(context), body=RerankRequest, name=f"rerank{suffix}")
            for path, suffix in zip(RERANK_PATHS, ("", "2", "WithoutVersion"), strict=True)
        ),
        _post("/v1/messages/count_tokens", count_tokens, body=MessagesPromptRequest),
        *_response_routes(context),
        _post("/tokenize", tokenize_endpoint(context), body=TokenizeRequest),
        _post("/detokenize", detokenize_endpoint(context), body=DetokenizeRequest),
        _post("/apply-template", template_endpoint(context), body=TemplateRequest),
        _read("/v1/models", models_endpoint(context), name="listUsableModels"),
        _read("/v1/models/{model_id:path}", model_endpoint(context)),
    ]


def _response_routes(context: RouteContext) -> Sequence[Route]:
    settings = context.services.settings
    store = ResponseStore(
        max_count=settings.stored_responses, max_bytes=settings.stored_responses_bytes
    )
    one = "/v1/responses/{response_id}"
    create = responses_endpoint(context, store)
    count_tokens = input_tokens_endpoint(context, store)
    return [
        _post("/v1/responses", create, body=ResponsesRequest),
        _post("/v1/responses/input_tokens", count_tokens, body=ResponsesRequest),
        _read(f"{one}/input_items", input_items_endpoint(store)),
        _post(f"{one}/cancel", cancel_response_endpoint(store), body=EmptyBody),
        _read(one, stored_response_endpoint(store)),
        _delete(one, delete_response_endpoint(store)),
    ]
