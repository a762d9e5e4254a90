"""`POST /v1/completions`: request, handler, whole answers and streamed chunks."""

import json
import math
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, ClassVar

from openai.types import Completion
from pydantic import Field, PlainValidator
from starlette.requests import Request
from starlette.responses import Response

from core.errors import RequestError, UnsupportedParameter
from core.types import (
    Capability,
    Finished,
    GenerationEvent,
    GenerationRequest,
    InfillPrompt,
    JsonValue,
    Output,
    PrefillProgress,
    Priority,
    Prompt,
    ReasoningDelta,
    TextDelta,
    TextPrompt,
    TokenLogprob,
    TokenPrompt,
    TokenRules,
    ToolCallDelta,
)
from router.answers.event_stream import EventStream
from router.answers.generation import Generation, client_closed_response
from router.answers.logprobs import LegacyLogprobs, prompt_logprobs, scored_prompt
from router.context import RouteContext, record_of
from router.requests.body import read_request
from router.requests.fields import (
    OPENAI_HINTS,
    LogprobCount,
    NoLimit,
    WholeNumber,
    parse_inputs,
)
from router.requests.limits import MAX_INT32, MAX_N
from router.requests.model_defaults import with_defaults
from router.requests.output_format import OutputFields
from router.requests.priority import request_priority
from router.v1.chunks import ChunkFormatter

MAX_PROMPTS = 128
DEFAULT_COMPLETION_TOKENS = 16


def _parse_prompt(value: object) -> tuple[str | tuple[int, ...], ...]:
    """Return the prompts; null is the beginning of a new text.  Raises ValueError."""
    return ("",) if value is None else parse_inputs(value)


class CompletionRequest(OutputFields):
    """Body of `POST /v1/completions`."""

    harmless: ClassVar = OPENAI_HINTS

    prompt: Annotated[tuple[str | tuple[int, ...], ...], PlainValidator(_parse_prompt)]
    max_tokens: Annotated[
        Annotated[int, Field(ge=0, le=MAX_INT32), WholeNumber] | None, NoLimit
    ] = None
    suffix: str | None = None
    echo: bool | None = None
    logprobs: LogprobCount | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_N), WholeNumber] | None = None

    def refuse_unsupported(self) -> None:
        """Also refuse fields that contradict each other, and too many sequences."""
        super().refuse_unsupported()
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise RequestError(
                f"best_of: {self.best_of} must be n or more, which is {self.n}", param="best_of"
            )
        if self.chooses and self.stream:
            raise RequestError(
                "best_of: over n, it cannot be streamed; leave stream out", param="best_of"
            )
        count = len(self.prompt) * self.candidates
        if count > MAX_PROMPTS:
            raise RequestError(
                f"prompt: {count} sequences (prompts times n or best_of) were requested; at most "
                f"{MAX_PROMPTS} are accepted",
                param="prompt",
            )
        if self.suffix and self.echo:
            raise RequestError("suffix: cannot be combined with echo; send one", param="suffix")
        if self.suffix and not all(isinstance(prompt, str) for prompt in self.prompt):
            raise RequestError("suffix: needs the prompt as text, not as token ids", param="suffix")

    @property
    def candidates(self) -> int:
        """How many sequences are generated for each prompt."""
        return self.best_of or self.n or 1

    @property
    def chooses(self) -> bool:
        """Whether only the likeliest of the sequences are returned."""
        return self.candidates > (self.n or 1)

    @property
    def generated_alternatives(self) -> int | None:
        """How many alternatives are computed for each generated token, None for no logprobs."""
        return 0 if self.logprobs is None and self.chooses else self.logprobs

    @property
    def echoes_logprobs(self) -> bool:
        """Whether the echoed prompt's tokens are listed in `logprobs`."""
        return bool(self.echo) and self.logprobs is not None

    @property
    def scored_alternatives(self) -> int | None:
        """How many alternatives are computed for each prompt token, None for no logprobs."""
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((count for count in wanted if count is not None), default=None)

    @property
    def token_limit(self) -> int:
        """The maximum of generated tokens; OpenAI's default is 16."""
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens


def completion_endpoint(context: RouteContext) -> Callable[[Request], Awaitable[Response]]:
    """Return the handler."""

    async def create_completion(request: Request) -> Response:
        body, (output, rules, ignored) = await read_request(request, CompletionRequest, _converted)
        record = record_of(request.scope)
        view = await context.model(body.model, Capability.COMPLETION, record)
        if body.suffix and Capability.INFILL not in view.capabilities:
            raise UnsupportedParameter(
                f"suffix: the model {view.id} has no tokens for filling in the middle; leave "
                "suffix out or choose another model.",
                param="suffix",
            )
        answer_id = f"cmpl-{record.suffix}"
        priority = request_priority(request, body.service_tier, view)
        limit_s = context.services.settings.request_timeout_s
        asked = _requests(body, output, rules, answer_id, view.id, limit_s, priority)
        requests = tuple(with_defaults(one, view, body) for one in asked)
        headers = context.ignored.report(ignored)
        generation = Generation(context, view, requests, body.candidates, headers)
        if body.stream:
            return EventStream(generation, CompletionChunks(generation, answer_id, body))
        choices = await generation.collect(request.receive)
        if choices is None:
            return client_closed_response()
        completion = {
            **_base(generation, answer_id),
            "choices": [
                _choice(index, events, body) for index, events in enumerate(_chosen(choices, body))
            ],
            "usage": generation.usage(),
        }
        if body.timings_per_token:
            completion["timings"] = generation.llama_timings()
        return Response(
            _encoded(completion, body),
            media_type="application/json",
            headers=generation.answer_headers(),
        )

    return create_completion


def _converted(body: CompletionRequest) -> tuple[Output | None, TokenRules | None, list[str]]:
    return body.output(), body.rules(), body.ignored_names()


def _requests(
    body: CompletionRequest,
    output: Output | None,
    rules: TokenRules | None,
    answer_id: str,
    model_id: str,
    deadline_s: float,
    priority: Priority,
) -> tuple[GenerationRequest, ...]:
    n = body.candidates
    count = n * len(body.prompt)
    return tuple(
        GenerationRequest(
            id=answer_id if count == 1 else f"{answer_id}-{number * n + index}",
            model_id=model_id,
            prompt=_prompt(prompt, body.suffix),
            sampling=body.sampling(
                top_logprobs=body.generated_alternatives,
                prompt_logprobs=body.scored_alternatives,
                index=index,
            ),
            max_tokens=body.token_limit,
            stop=body.stop,
            output=output,
            echo_prompt=bool(body.echo),
            deadline_s=deadline_s,
            priority=priority,
            rules=rules,
            reads_cache=body.cache_prompt is not False,
        )
        for number, prompt in enumerate(body.prompt)
        for index in range(n)
    )


def _prompt(prompt: str | tuple[int, ...], suffix: str | None) -> Prompt:
    if not isinstance(prompt, str):
        return TokenPrompt(prompt)
    return InfillPrompt(prompt, suffix) if suffix else TextPrompt(prompt)


def _base(generation: Generation, answer_id: str) -> dict[str, JsonValue]:
    completion = Completion(
        id=answer_id,
        object="text_completion",
        created=generation.created_at,
        model=generation.view.id,
        choices=[],
    )
    base: dict[str, JsonValue] = completion.model_dump(mode="json", exclude_unset=True)
    return base


def _text(event: GenerationEvent) -> tuple[str, Sequence[TokenLogprob]]:
    """Return the text that an event adds; completions include reasoning and calls in the text."""
    match event:
        case TextDelta():
            return event.text, event.logprobs
        case ReasoningDelta():
            return event.text, ()
        case ToolCallDelta():
            return event.arguments, ()
        case PrefillProgress() | Finished():
            return "", ()


def _reason(event: Finished) -> str:
    """Return why a completion ended; the API has no tool calls."""
    return "length" if event.reason == "length" else "stop"


def _encoded(completion: dict[str, Any], body: CompletionRequest) -> str:
    """Return the validated JSON.

    OpenAI's type of `logprobs` lacks the null of an echoed prompt's first token, which its
    reference and its service have; there it is put in after the validation.
    """
    if not body.echoes_logprobs:
        return Completion.model_validate(completion).model_dump_json(exclude_unset=True)
    columns = [choice.pop("logprobs") for choice in completion["choices"]]
    valid = Completion.model_validate(completion).model_dump(mode="json", exclude_unset=True)
    for choice, logprobs in zip(valid["choices"], columns, strict=True):
        choice["logprobs"] = logprobs
    return json.dumps(valid, ensure_ascii=False, separators=(",", ":"))


def _chosen(
    choices: Sequence[Sequence[GenerationEvent]], body: CompletionRequest
) -> Iterator[Sequence[GenerationEvent]]:
    """Yield `n` choices of each prompt: the likeliest by the mean of their log-probabilities.

    Source: OpenAI's API reference, completions, `best_of`.
    """
    count = body.candidates
    for first in range(0, len(choices), count):
        of_prompt = choices[first : first + count]
        if body.chooses:
            of_prompt = sorted(of_prompt, key=_likelihood, reverse=True)[: body.n or 1]
        yield from of_prompt


def _likelihood(events: Sequence[GenerationEvent]) -> float:
    """Return the mean log-probability of an answer's tokens; 0 for an answer without any."""
    logprobs = [
        token.logprob
        for event in events
        if isinstance(event, TextDelta)
        for token in event.logprobs
        if not math.isnan(token.logprob)
    ]
    return sum(logprobs) / len(logprobs) if logprobs else 0.0


def _choice(
    index: int, events: Sequence[GenerationEvent], body: CompletionRequest
) -> dict[str, JsonValue]:
    columns = LegacyLogprobs(body.logprobs)
    logprobs: dict[str, list[JsonValue]] = {}
    text: list[str] = []
    reason = "stop"
    for event in events:
        if isinstance(event, PrefillProgress) and body.echoes_logprobs:
            columns.hold(event.logprobs)
        new_text, new_logprobs = _text(event)
        new_logprobs = new_logprobs or columns.echoed(new_text)
        text.append(new_text)
        for name, column in columns.columns(new_text, new_logprobs).items():
            logprobs.setdefault(name, []).extend(column)
        if isinstance(event, Finished):
            reason = _reason(event)
    choice: dict[str, JsonValue] = {
        "index": index,
        "text": "".join(text),
        "logprobs": None if body.logprobs is None else dict(logprobs),
        "finish_reason": reason,
    }
    if body.prompt_logprobs is not None:
        choice["prompt_logprobs"] = prompt_logprobs(scored_prompt(events), body.prompt_logprobs)
    return choice


class CompletionChunks(ChunkFormatter):
    """Formats events as streamed `text_completion`."""

    def __init__(self, generation: Generation, answer_id: str, body: CompletionRequest) -> None:
        super().__init__(
            generation,
            _base(generation, answer_id),
            includes_usage=body.includes_usage,
            has_logprobs=body.logprobs is not None,
            has_timings=bool(body.timings_per_token),
        )
        self._body = body
        self._columns: dict[int, LegacyLogprobs] = {}

    def note_prefill(self, index: int, event: PrefillProgress) -> None:
        """Keep the log-probabilities of a prompt until its text comes."""
        if event.logprobs and self._body.echoes_logprobs:
            self._of(index).hold(event.logprobs)

    def _of(self, index: int) -> LegacyLogprobs:
        if index not in self._columns:
            self._columns[index] = LegacyLogprobs(self._body.logprobs)
        return self._columns[index]

    def choices(self, index: int, event: GenerationEvent) -> Iterable[dict[str, JsonValue]]:
        """Return at most one choice."""
        text, logprobs = _text(event)
        if not self._has_logprobs:
            logprobs = ()
        logprobs = logprobs or self._of(index).echoed(text)
        if not (text or logprobs or isinstance(event, Finished)):
            return ()
        choice: dict[str, JsonValue] = {
            "index": index,
            "text": text,
            "logprobs": None,
            "finish_reason": _reason(event) if isinstance(event, Finished) else None,
        }
        columns = self._of(index).columns(text, logprobs)
        if logprobs:
            choice["logprobs"] = dict(columns)
        return (choice,)
