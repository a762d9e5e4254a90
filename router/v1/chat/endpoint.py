"""`POST /v1/chat/completions`: the handler, whole answers and streamed chunks."""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.chat_completion import Choice
from starlette.requests import Request
from starlette.responses import Response

from core.types import (
    Capability,
    ChatPrompt,
    Finished,
    GenerationEvent,
    GenerationRequest,
    JsonValue,
    Output,
    PrefillProgress,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    TokenRules,
    ToolCallDelta,
)
from router.answers.event_stream import EventStream
from router.answers.generation import Generation, client_closed_response
from router.answers.logprobs import chat_logprobs, prompt_logprobs, scored_prompt
from router.context import RouteContext, record_of
from router.requests.body import read_request
from router.requests.model_defaults import with_defaults
from router.requests.priority import request_priority
from router.requests.reasoning import for_model, unused_effort
from router.requests.unreadable import UnreadableParts
from router.v1.chat.calls import CallChunks, CallForm
from router.v1.chat.prompt import to_chat_prompt, with_continuation
from router.v1.chat.request import ChatRequest
from router.v1.chunks import ChunkFormatter


def chat_endpoint(context: RouteContext) -> Callable[[Request], Awaitable[Response]]:
    """Return the handler."""

    async def create_chat_completion(request: Request) -> Response:
        body, (prompt, output, rules, ignored) = await read_request(
            request, ChatRequest, _converted
        )
        record = record_of(request.scope)
        view = await context.model(body.model, Capability.CHAT, record)
        settings = context.services.settings
        prompt = with_continuation(prompt, body, view, by_default=settings.continue_answers)
        priority = request_priority(request, body.service_tier, view)
        answer_id = f"chatcmpl-{record.suffix}"
        n = body.n or 1
        requests = tuple(
            with_defaults(
                GenerationRequest(
                    id=answer_id if n == 1 else f"{answer_id}-{index}",
                    model_id=view.id,
                    prompt=for_model(prompt, view),
                    sampling=body.sampling(
                        top_logprobs=body.logprob_count,
                        # All choices have the same prompt.
                        prompt_logprobs=None if index else body.prompt_logprobs,
                        index=index,
                    ),
                    max_tokens=body.token_limit,
                    stop=body.stop,
                    output=output,
                    deadline_s=settings.request_timeout_s,
                    priority=priority,
                    rules=rules,
                    reads_cache=body.cache_prompt is not False,
                ),
                view,
                body,
            )
            for index in range(n)
        )
        headers = context.ignored.report([*ignored, *unused_effort(view, body.efforts)])
        generation = Generation(context, view, requests, n, headers)
        if body.stream:
            return EventStream(generation, ChatChunks(generation, answer_id, body))
        choices = await generation.collect(request.receive)
        if choices is None:
            return client_closed_response()
        return _completion(generation, answer_id, choices, body)

    return create_chat_completion


def _converted(
    body: ChatRequest,
) -> tuple[ChatPrompt, Output | None, TokenRules | None, list[str]]:
    unreadable = UnreadableParts()
    prompt = to_chat_prompt(body, unreadable)
    ignored = [*body.ignored_names(), *sorted(unreadable.names)]
    return prompt, body.output(), body.rules(), ignored


def _completion(
    generation: Generation,
    answer_id: str,
    choices: Sequence[Sequence[GenerationEvent]],
    body: ChatRequest,
) -> Response:
    has_logprobs, form = bool(body.logprobs), CallForm.of(body)
    extra: dict[str, Any] = {}
    if body.prompt_logprobs is not None:
        extra["prompt_logprobs"] = prompt_logprobs(scored_prompt(choices[0]), body.prompt_logprobs)
    completion = ChatCompletion(
        id=answer_id,
        object="chat.completion",
        created=generation.created_at,
        model=generation.view.id,
        choices=[
            Choice.model_validate(_choice(index, events, form, has_logprobs=has_logprobs))
            for index, events in enumerate(choices)
        ],
        usage=generation.usage(),
        **extra,
    )
    if body.timings_per_token:
        completion = completion.model_copy(update={"timings": generation.llama_timings()})
    return Response(
        completion.model_dump_json(exclude_unset=True),
        media_type="application/json",
        headers=generation.answer_headers(),
    )


def _choice(
    index: int, events: Iterable[GenerationEvent], form: CallForm, *, has_logprobs: bool
) -> dict[str, JsonValue]:
    text: list[str] = []
    reasoning: list[str] = []
    logprobs: list[TokenLogprob] = []
    calls: dict[int, list[ToolCallDelta]] = {}
    reason = "stop"
    for event in events:
        match event:
            case TextDelta():
                text.append(event.text)
                logprobs.extend(event.logprobs)
            case ReasoningDelta():
                reasoning.append(event.text)
            case ToolCallDelta():
                calls.setdefault(event.index, []).append(event)
            case Finished():
                reason = form.reason(event.reason)
            case PrefillProgress():
                pass
    content = "".join(text)
    message: dict[str, JsonValue] = {
        "role": "assistant",
        "content": None if calls and not content else content,
        "refusal": None,
    }
    if reasoning:
        message["reasoning_content"] = "".join(reasoning)
    message |= form.fields(calls)
    return {
        "index": index,
        "message": message,
        "logprobs": chat_logprobs(logprobs) if has_logprobs else None,
        "finish_reason": reason,
    }


class ChatChunks(ChunkFormatter):
    """Formats events as `chat.completion.chunk`."""

    def __init__(self, generation: Generation, answer_id: str, body: ChatRequest) -> None:
        base = ChatCompletionChunk(
            id=answer_id,
            object="chat.completion.chunk",
            created=generation.created_at,
            model=generation.view.id,
            choices=[],
        ).model_dump(mode="json", exclude_unset=True)
        super().__init__(
            generation,
            base,
            includes_usage=body.includes_usage,
            has_logprobs=bool(body.logprobs),
            has_timings=bool(body.timings_per_token),
        )
        self._form = CallForm.of(body)
        self._calls: dict[int, CallChunks] = {}

    def opening(self, index: int) -> Iterable[dict[str, JsonValue]]:
        """Return the chunk that names the role."""
        return (_chunk_choice(index, {"role": "assistant", "content": "", "refusal": None}),)

    def choices(self, index: int, event: GenerationEvent) -> Iterable[dict[str, JsonValue]]:
        """Return a choice for the event, after one for a call that it completes."""
        calls = self._calls.get(index)
        if calls is None:
            calls = self._calls[index] = CallChunks(self._form)
        yield from (_chunk_choice(index, delta) for delta in calls.deltas(event))
        match event:
            case TextDelta():
                logprobs = event.logprobs if self._has_logprobs else ()
                if not (event.text or logprobs):
                    return
                choice = _chunk_choice(index, {"content": event.text})
                if logprobs:
                    choice["logprobs"] = chat_logprobs(logprobs)
                yield choice
            case ReasoningDelta() if event.text:
                yield _chunk_choice(index, {"reasoning_content": event.text})
            case Finished():
                reason = self._form.reason(event.reason)
                yield {**_chunk_choice(index, {}), "finish_reason": reason}


def _chunk_choice(index: int, delta: dict[str, JsonValue]) -> dict[str, JsonValue]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
