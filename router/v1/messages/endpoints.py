"""`POST /v1/messages` and `POST /v1/messages/count_tokens`."""

from collections.abc import Awaitable, Callable

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from core.types import Capability, ChatPrompt, GenerationRequest, JsonOutput
from router.answers.event_feed import unless_disconnected
from router.answers.event_stream import EventStream
from router.answers.generation import Generation, client_closed_response
from router.answers.parts import PartAssembler
from router.context import RouteContext, record_of
from router.requests.body import read_request
from router.requests.priority import request_priority
from router.requests.reasoning import for_model
from router.v1.messages import answer
from router.v1.messages.blocks import BlockReader
from router.v1.messages.prompt import to_messages_prompt
from router.v1.messages.request import MessagesPromptRequest, MessagesRequest
from router.v1.messages.stream import MessageEvents


def messages_endpoint(context: RouteContext) -> Callable[[Request], Awaitable[Response]]:
    """Return the handler that answers a conversation."""

    async def create_message(request: Request) -> Response:
        body, (prompt, output, ignored) = await read_request(request, MessagesRequest, _converted)
        record = record_of(request.scope)
        view = await context.model(body.model, Capability.CHAT, record)
        message_id = f"msg_{record.suffix}"
        generation_request = GenerationRequest(
            id=message_id,
            model_id=view.id,
            prompt=for_model(prompt, view),
            sampling=body.sampling,
            max_tokens=body.max_tokens,
            stop=body.stop_sequences,
            output=output,
            deadline_s=context.services.settings.request_timeout_s,
            priority=request_priority(request, None, view),
        )
        headers = context.ignored.report(ignored)
        generation = Generation(context, view, (generation_request,), 1, headers)
        if body.stream:
            return EventStream(generation, MessageEvents(generation, message_id, body))
        choices = await generation.collect(request.receive)
        if choices is None:
            return client_closed_response()
        assembler = PartAssembler(keeps_empty=False)
        parts = assembler.push_all(choices[0])
        assert assembler.finished is not None
        message = answer.message(
            message_id,
            view.id,
            [answer.block(part, hides_thinking=body.hides_thinking) for part in parts],
            answer.usage(assembler.finished.usage),
            answer.ending(assembler.finished, body.stop_sequences),
        )
        return Response(
            to_json(message), media_type="application/json", headers=generation.answer_headers()
        )

    return create_message


def _converted(
    body: MessagesPromptRequest,
) -> tuple[ChatPrompt, JsonOutput | None, list[str]]:
    reader = BlockReader()
    prompt = to_messages_prompt(body, reader)
    noted = [f"messages.content.{kind}" for kind in sorted(reader.noted)]
    return prompt, body.output, [*body.ignored_names(), *noted]


def count_tokens_endpoint(context: RouteContext) -> Callable[[Request], Awaitable[Response]]:
    """Return the handler that counts a prompt's tokens."""

    async def count_tokens(request: Request) -> Response:
        body, (prompt, _, ignored) = await read_request(request, MessagesPromptRequest, _converted)
        view = await context.model(body.model, Capability.CHAT, record_of(request.scope))
        deadline_s = context.services.settings.request_timeout_s
        count = await unless_disconnected(
            context.services.dispatcher.count_tokens(view.id, prompt, deadline_s), request.receive
        )
        if count is None:
            return client_closed_response()
        return Response(
            to_json({"input_tokens": count}),
            media_type="application/json",
            headers=context.ignored.report(ignored),
        )

    return count_tokens
