"""`POST /v1/messages` and `POST /v1/messages/count_tokens`."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from core.types import Capability, ChatPrompt, GenerationRequest, JsonOutput
from router.answers.event_feed import unless_disconnected
from router.answers.event_stream import EventStream
from router.answers.generation import Generation, client_closed_response
from router.answers.parts import Part, PartAssembler
from router.context import RouteContext, record_of
from router.requests.body import read_request
from router.requests.model_defaults import prompt_with_defaults, with_defaults
from router.requests.priority import request_priority
from router.requests.reasoning import for_model, unused_effort
from router.v1.messages import answer
from router.v1.messages.blocks import BlockReader
from router.v1.messages.compaction import (
    compaction_block,
    compaction_ending,
    summarizing,
    summary_events,
)
from router.v1.messages.prompt import read_thread, thread_prompt, with_answer
from router.v1.messages.request import MessagesPromptRequest, MessagesRequest
from router.v1.messages.stream import MessageEvents
from router.v1.messages.threads import EMPTY, KeptThread, ThreadStore


@dataclass(frozen=True, slots=True)
class _Converted:
    """What a request's body became; `thread` is the whole conversation so far."""

    prompt: ChatPrompt
    thread: KeptThread
    output: JsonOutput | None
    ignored: list[str]


def messages_endpoint(
    context: RouteContext, threads: ThreadStore
) -> Callable[[Request], Awaitable[Response]]:
    """Return the handler that answers a conversation."""
    convert = partial(_converted, threads)

    async def create_message(request: Request) -> Response:
        body, converted = await read_request(request, MessagesRequest, convert)
        record = record_of(request.scope)
        view = await context.model(body.model, Capability.CHAT, record)
        message_id = f"msg_{record.suffix}"
        prompt, compaction = converted.prompt, body.compaction
        if compaction is not None:
            prompt = summarizing(prompt, compaction.instructions)
        generation_request = with_defaults(
            GenerationRequest(
                id=message_id,
                model_id=view.id,
                prompt=for_model(prompt, view),
                sampling=body.sampling,
                max_tokens=max(body.max_tokens, 1),
                stop=body.stop_sequences,
                output=None if compaction is not None else converted.output,
                deadline_s=context.services.settings.request_timeout_s,
                priority=request_priority(request, None, view),
            ),
            view,
            body,
        )

        def keep(parts: Sequence[Part]) -> None:
            """Keep the conversation with its answer, if the client asked for that."""
            if body.thread is not None and compaction is None:
                blocks = (answer.block(part, hides_thinking=False) for part in parts)
                whole = with_answer(converted.thread, blocks)
                threads.put(message_id, whole, body.previous_message_id)

        effort = body.output_config.effort if body.output_config else None
        unused = unused_effort(view, {"output_config.effort": effort})
        headers = context.ignored.report([*converted.ignored, *unused])
        generation = Generation(context, view, (generation_request,), 1, headers)
        if body.stream:
            return EventStream(generation, MessageEvents(generation, message_id, body, keep))
        choices = await generation.collect(request.receive)
        if choices is None:
            return client_closed_response()
        assembler = PartAssembler(keeps_empty=False)
        events = choices[0]
        if body.only_warms:
            events = [event for each in events if (event := answer.warmed(each)) is not None]
        if compaction is not None:
            events = summary_events(events)
        parts = assembler.push_all(events)
        assert assembler.finished is not None
        keep(parts)
        blocks = [answer.block(part, hides_thinking=body.hides_thinking) for part in parts]
        ending = answer.ending(assembler.finished, body.stop_sequences)
        if compaction is not None:
            blocks, ending = [compaction_block(parts)], compaction_ending(ending)
        usage = answer.message_usage(assembler.finished.usage)
        message = answer.message(message_id, view.id, blocks, usage, ending)
        return Response(
            to_json(message), media_type="application/json", headers=generation.answer_headers()
        )

    return create_message


def _converted(threads: ThreadStore, body: MessagesPromptRequest) -> _Converted:
    earlier = EMPTY
    if body.previous_message_id is not None:
        earlier = threads.get(body.previous_message_id)
    elif body.thread is not None:
        threads.check_keeps()
    reader = BlockReader()
    thread = read_thread(body, reader, earlier)
    ignored = [*body.ignored_names(), *sorted(reader.unreadable.names)]
    return _Converted(thread_prompt(body, thread), thread, body.output, ignored)


def count_tokens_endpoint(
    context: RouteContext, threads: ThreadStore
) -> Callable[[Request], Awaitable[Response]]:
    """Return the handler that counts a prompt's tokens."""
    convert = partial(_converted, threads)

    async def count_tokens(request: Request) -> Response:
        body, converted = await read_request(request, MessagesPromptRequest, convert)
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
        return Response(
            to_json({"input_tokens": count}),
            media_type="application/json",
            headers=context.ignored.report(converted.ignored),
        )

    return count_tokens
