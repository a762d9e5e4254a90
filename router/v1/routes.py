"""The table of routes that answer with models: OpenAI's, Anthropic's and llama.cpp's paths."""

from collections.abc import Sequence
from functools import partial

from router.context import RouteContext
from router.http.access import Access
from router.requests.strict_body import EmptyBody
from router.route import Route
from router.v1.answer_types.chat import ChatAnswer, ChatChunk
from router.v1.answer_types.messages import (
    MessageAnswer,
    MessageEvent,
    ModelInfo,
    ModelInfoPage,
    TokenCount,
)
from router.v1.answer_types.responses import (
    DeletedResponse,
    InputItemPage,
    InputTokens,
    ResponseAnswer,
    ResponseEvent,
)
from router.v1.answer_types.texts import (
    CompletionAnswer,
    CompletionChunk,
    DetokenizedAnswer,
    EmbeddingsAnswer,
    RerankAnswer,
    TemplateAnswer,
    TokensAnswer,
)
from router.v1.chat.endpoint import chat_endpoint
from router.v1.chat.request import ChatRequest
from router.v1.completions import CompletionRequest, completion_endpoint
from router.v1.embeddings import EmbeddingRequest, embedding_endpoint
from router.v1.messages.endpoints import count_tokens_endpoint, messages_endpoint
from router.v1.messages.request import MessagesPromptRequest, MessagesRequest
from router.v1.messages.threads import ThreadStore
from router.v1.models import ModelObject, ModelPage, model_endpoint, models_endpoint
from router.v1.queries import InputItemsQuery, ModelsQuery, StoredResponseQuery
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
    chat, completion = chat_endpoint(context), completion_endpoint(context)
    embedding, models = embedding_endpoint(context), models_endpoint(context)
    rerank = partial(_post, endpoint=rerank_endpoint(context), body=RerankRequest)
    return [
        _post("/v1/chat/completions", chat, body=ChatRequest, answer=ChatAnswer, event=ChatChunk),
        _post(
            "/v1/completions",
            completion,
            body=CompletionRequest,
            answer=CompletionAnswer,
            event=CompletionChunk,
        ),
        _post(
            "/v1/messages",
            messages,
            body=MessagesRequest,
            answer=MessageAnswer,
            event=MessageEvent,
        ),
        _post("/v1/embeddings", embedding, body=EmbeddingRequest, answer=EmbeddingsAnswer),
        *(
            rerank(path, answer=RerankAnswer, name=f"rerank{suffix}")
            for path, suffix in zip(RERANK_PATHS, ("", "2", "WithoutVersion"), strict=True)
        ),
        _post(
            "/v1/messages/count_tokens",
            count_tokens,
            body=MessagesPromptRequest,
            answer=TokenCount,
        ),
        *_response_routes(context),
        *_token_routes(context),
        _read(
            "/v1/models",
            models,
            query=ModelsQuery,
            answer=ModelPage | ModelInfoPage,
            name="listUsableModels",
        ),
        _read(
            "/v1/models/{model_id:path}", model_endpoint(context), answer=ModelObject | ModelInfo
        ),
    ]


def _token_routes(context: RouteContext) -> Sequence[Route]:
    tokenize, detokenize = tokenize_endpoint(context), detokenize_endpoint(context)
    template = template_endpoint(context)
    return [
        _post("/tokenize", tokenize, body=TokenizeRequest, answer=TokensAnswer),
        _post("/detokenize", detokenize, body=DetokenizeRequest, answer=DetokenizedAnswer),
        _post("/apply-template", template, body=TemplateRequest, answer=TemplateAnswer),
    ]


def _response_routes(context: RouteContext) -> Sequence[Route]:
    settings = context.services.settings
    store = ResponseStore(
        max_count=settings.stored_responses, max_bytes=settings.stored_responses_bytes
    )
    one = "/v1/responses/{response_id}"
    create = responses_endpoint(context, store)
    count_tokens = input_tokens_endpoint(context, store)
    items, stored = input_items_endpoint(store), stored_response_endpoint(store)
    cancel = cancel_response_endpoint(store)
    return [
        _post(
            "/v1/responses",
            create,
            body=ResponsesRequest,
            answer=ResponseAnswer,
            event=ResponseEvent,
        ),
        _post(
            "/v1/responses/input_tokens", count_tokens, body=ResponsesRequest, answer=InputTokens
        ),
        _read(f"{one}/input_items", items, query=InputItemsQuery, answer=InputItemPage),
        # No answer runs in the background.
        _post(f"{one}/cancel", cancel, body=EmptyBody, status=400),
        _read(one, stored, query=StoredResponseQuery, answer=ResponseAnswer),
        _delete(one, delete_response_endpoint(store), answer=DeletedResponse),
    ]
