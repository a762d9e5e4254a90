"""`POST /v1/responses`, and counting its tokens."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from core.errors import PreviousResponseNotFound
from core.types import Capability, ChatPrompt, GenerationRequest
from router.answers.event_feed import unless_disconnected
from router.answers.event_stream import EventStream
from router.answers.generation import Generation, client_closed_response
from router.answers.parts import PartAssembler
from router.context import RouteContext, record_of
from router.requests.body import read_request
from router.requests.model_defaults import prompt_with_defaults, with_defaults
from router.requests.priority import request_priority
from router.requests.reasoning import unused_effort
from router.v1.responses.items import ItemReader
from router.v1.responses.object import Conversation, ResponseBuilder, to_json
from router.v1.responses.prompt import to_responses_prompt
from router.v1.responses.references import resolved_input
from router.v1.responses.request import ResponsesRequest
from router.v1.responses.store import ResponseStore, StoredResponse
from router.v1.responses.stream import ResponseEvents
from router.v1.responses.tools import OfferedTools, offer_tools


def responses_endpoint(
    context: RouteContext, store: ResponseStore
) -> Callable[[Request], Awaitable[Response]]:
    """Return the handler that answers a conversation."""

    async def create_response(request: Request) -> Response:
        record = record_of(request.scope)
        convert = partial(_converted, store, record.suffix)
        body, converted = await read_request(request, ResponsesRequest, convert)
        view = await context.model(body.model, Capability.CHAT, record)
        generation_request = with_defaults(
            GenerationRequest(
                id=f"resp_{record.suffix}",
                model_id=view.id,
                prompt=converted.prompt,
                sampling=body.sampling(top_logprobs=body.logprob_count),
                max_tokens=body.max_output_tokens,
                stop=body.stop,
                output=body.output,
                deadline_s=context.services.settings.request_timeout_s,
                priority=request_priority(request, body.service_tier, view),
            ),
            view,
            body,
        )
        effort = body.reasoning.effort if body.reasoning else None
        unused = unused_effort(view, {"reasoning.effort": effort})
        headers = context.ignored.report([*converted.ignored, *unused])
        generation = Generation(context, view, (generation_request,), 1, headers)
        builder = ResponseBuilder(
            body, record.suffix, generation, converted.conversation, store, converted.offered
        )
        if body.stream:
            return EventStream(generation, ResponseEvents(builder))
        choices = await generation.collect(request.receive)
        if choices is None:
            return client_closed_response()
        assembler = PartAssembler(keeps_empty=True)
        assembler.push_all(choices[0])
        return Response(
            to_json(builder.finished(assembler)),
            media_type="application/json",
            headers=generation.answer_headers(),
        )

    return create_response


@dataclass(frozen=True, slots=True)
class _Converted:
    prompt: ChatPrompt
    offered: OfferedTools
    conversation: Conversation
    ignored: Sequence[str]


def _converted(store: ResponseStore, suffix: str, body: ResponsesRequest) -> _Converted:
    offered = offer_tools(body)
    reader = ItemReader()
    earlier = _earlier(store, body.previous_response_id)
    sent = resolved_input(body, store)
    messages = (*earlier.conversation, *reader.messages(sent.items))
    # Nothing is kept of answers that are not stored.
    items = () if body.store is False else tuple(sent.stored(suffix))
    return _Converted(
        to_responses_prompt(body, messages, offered),
        offered,
        Conversation(messages, (*earlier.inputs, *earlier.outputs, *items)),
        [*body.ignored_names(), *offered.ignored, *sent.skipped, *reader.ignored],
    )


def input_tokens_endpoint(
    context: RouteContext, store: ResponseStore
) -> Callable[[Request], Awaitable[Response]]:
    """Return the handler that counts a prompt's tokens."""

    async def count_input_tokens(request: Request) -> Response:
        convert = partial(_converted, store, record_of(request.scope).suffix)
        body, converted = await read_request(request, ResponsesRequest, convert)
        view = await context.model(body.model, Capability.CHAT, record_of(request.scope))
        deadline_s = context.services.settings.request_timeout_s
        count = await unless_disconnected(
            context.services.dispatcher.count_tokens(
                view.id, prompt_with_defaults(converted.prompt, view), deadline_s
            ),
            request.receive,
        )
        if count is None:
            return client_closed_response()
        return JSONResponse(
            {"object": "response.input_tokens", "input_tokens": count},
            headers=context.ignored.report(converted.ignored),
        )

    return count_input_tokens


def _earlier(store: ResponseStore, response_id: str | None) -> StoredResponse:
    if response_id is None:
        return StoredResponse(b"", ())
    stored = store.get(response_id)
    if stored is None:
        raise PreviousResponseNotFound(
            f"Previous response with id {response_id[:100]!r} not found; send the conversation as "
            "input instead.",
            param="previous_response_id",
        )
    return stored
