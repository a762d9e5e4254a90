"""`POST /v1/responses`, token counting, and stored responses."""

from collections.abc import Awaitable, Callable
from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from core.errors import NotFound, PreviousResponseNotFound
from core.types import Capability, ChatMessage, ChatPrompt, GenerationRequest
from router.answers.event_feed import unless_disconnected
from router.answers.event_stream import EventStream
from router.answers.generation import Generation, client_closed_response
from router.answers.parts import PartAssembler
from router.context import RouteContext, record_of
from router.requests.body import read_request
from router.requests.fields import refuse_unless_off
from router.requests.priority import request_priority
from router.v1.responses.items import ItemReader
from router.v1.responses.object import ResponseBuilder, to_json
from router.v1.responses.prompt import to_responses_prompt
from router.v1.responses.request import ResponsesRequest
from router.v1.responses.store import ResponseStore
from router.v1.responses.stream import ResponseEvents
from router.v1.responses.tools import OfferedTools, offer_tools


def responses_endpoint(
    context: RouteContext, store: ResponseStore
) -> Callable[[Request], Awaitable[Response]]:
    """Return the handler that answers a conversation."""
    convert = partial(_converted, store)

    async def create_response(request: Request) -> Response:
        body, converted = await read_request(request, ResponsesRequest, convert)
        conversation, prompt, offered, ignored = converted
        record = record_of(request.scope)
        view = await context.model(body.model, Capability.CHAT, record)
        generation_request = GenerationRequest(
            id=f"resp_{record.suffix}",
            model_id=view.id,
            prompt=prompt,
            sampling=body.sampling(top_logprobs=body.logprob_count),
            max_tokens=body.max_output_tokens,
            stop=body.stop,
            output=body.output,
            deadline_s=context.services.settings.request_timeout_s,
            priority=request_priority(request, body.service_tier, view),
        )
        headers = context.ignored.report(ignored)
        generation = Generation(context, view, (generation_request,), 1, headers)
        builder = ResponseBuilder(body, record.suffix, generation, conversation, store, offered)
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


def _converted(
    store: ResponseStore, body: ResponsesRequest
) -> tuple[tuple[ChatMessage, ...], ChatPrompt, OfferedTools, list[str]]:
    offered = offer_tools(body)
    reader = ItemReader()
    earlier = _earlier(store, body.previous_response_id)
    conversation = (*earlier, *reader.messages(body.input))
    prompt = to_responses_prompt(body, conversation, offered)
    ignored = [*body.ignored_names(), *offered.ignored, *reader.ignored]
    return conversation, prompt, offered, ignored


def input_tokens_endpoint(
    context: RouteContext, store: ResponseStore
) -> Callable[[Request], Awaitable[Response]]:
    """Return the handler that counts a prompt's tokens."""
    convert = partial(_converted, store)

    async def count_input_tokens(request: Request) -> Response:
        body, (_, prompt, _, ignored) = await read_request(request, ResponsesRequest, convert)
        view = await context.model(body.model, Capability.CHAT, record_of(request.scope))
        deadline_s = context.services.settings.request_timeout_s
        count = await unless_disconnected(
            context.services.dispatcher.count_tokens(view.id, prompt, deadline_s), request.receive
        )
        if count is None:
            return client_closed_response()
        return JSONResponse(
            {"object": "response.input_tokens", "input_tokens": count},
            headers=context.ignored.report(ignored),
        )

    return count_input_tokens


def stored_response_endpoint(store: ResponseStore) -> Callable[[Request], Awaitable[Response]]:
    """Return the handler that shows a stored answer."""

    async def retrieve_response(request: Request) -> Response:
        refuse_unless_off("stream", request.query_params.get("stream", "false"), ("false",))
        response_id = str(request.path_params["response_id"])
        stored = store.get(response_id)
        if stored is None:
            raise _unknown(response_id)
        return Response(stored.body, media_type="application/json")

    return retrieve_response


def delete_response_endpoint(store: ResponseStore) -> Callable[[Request], Awaitable[Response]]:
    """Return the handler that deletes a stored answer."""

    async def delete_response(request: Request) -> Response:
        response_id = str(request.path_params["response_id"])
        if not store.delete(response_id):
            raise _unknown(response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    return delete_response


def _earlier(store: ResponseStore, response_id: str | None) -> tuple[ChatMessage, ...]:
    if response_id is None:
        return ()
    stored = store.get(response_id)
    if stored is None:
        raise PreviousResponseNotFound(
            f"Previous response with id {response_id[:100]!r} not found; send the conversation as "
            "input instead.",
            param="previous_response_id",
        )
    return stored.conversation


def _unknown(response_id: str) -> NotFound:
    return NotFound(f"There is no stored response with the id {response_id[:100]!r}.")
