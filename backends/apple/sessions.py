"""Runs one request to Apple's Foundation Models on a thread with its own event loop.

apple-fm-sdk waits for a stream without yielding to its event loop, so a shared loop cannot run it.
"""

import asyncio
import json
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from backends.apple.sdk import (
    capture_stream_callbacks,
    end_stream,
    import_sdk,
    open_transcript,
    translate_error,
)
from backends.apple.transcript import Conversation, call_schema, transcript
from backends.engine.failures import request_error
from backends.engine.threads import name_this_thread
from core.errors import ContextLengthExceeded, EngineFailed, ImpetusError
from core.types import JsonValue

logger = logging.getLogger(__name__)

_COUNT_TIMEOUT_S = 10.0
_BYTES_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class ForcedTool:
    """A tool that the model must call, if chosen; `schema` None means no arguments."""

    name: str
    schema: dict[str, JsonValue] | None


@dataclass(frozen=True, slots=True)
class SessionRequest:
    """The request to one session.

    `temperature` 0 is greedy.  `schema` constrains the answer; `forced` are the tools of which
    exactly one must be called instead of an answer.  `param` is the field that requested either.
    """

    conversation: Conversation
    max_tokens: int | None
    temperature: float | None
    schema: dict[str, JsonValue] | None = None
    forced: tuple[ForcedTool, ...] = ()
    param: str = "response_format"


@dataclass(frozen=True, slots=True)
class Started:
    """The session is open; `prompt_tokens` is the length of its prompt."""

    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The whole answer so far."""

    text: str


@dataclass(frozen=True, slots=True)
class ForcedCall:
    """The forced call; `arguments` is JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The answer is complete, was stopped, or has filled the context."""

    completion_tokens: int
    is_full: bool = False


@dataclass(frozen=True, slots=True)
class Failed:
    """The session failed."""

    error: ImpetusError


SessionEvent: TypeAlias = Started | Snapshot | ForcedCall | Ended | Failed


class AppleSession:
    """Runs one request on a thread of its own, which is left behind if the system hangs."""

    def __init__(
        self,
        model: Any,
        context_tokens: int,
        request: SessionRequest,
        on_event: Callable[[SessionEvent], None],
    ) -> None:
        """`model` is the SDK's; `on_event` is called from the session's thread."""
        self._model = model
        self._context_tokens = context_tokens
        self._request = request
        self._on_event = on_event
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._stream_callback: Any = None
        self._is_stopped = False
        self._prompt_tokens = 0
        self._is_counted = True
        self._text = ""
        self._thread = threading.Thread(target=self._run, name="impetus-apple", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the answer here; `Ended` is still sent.  Callable from any thread."""
        with self._lock:
            if not self._is_stopped:
                self._is_stopped = True
                end_stream(self._stream_callback)

    def cancel(self) -> None:
        """Cancel the request; further events are optional.  Callable from any thread."""
        self.stop()
        with self._lock:
            if self._loop is None or self._task is None:
                return
            try:
                self._loop.call_soon_threadsafe(self._task.cancel)
            except RuntimeError:
                logger.debug("the session has ended already")

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs; it outlives the last event by a moment."""
        return self._thread.is_alive()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread; return whether it has ended."""
        self._thread.join(timeout_s)
        return not self.is_alive

    def _run(self) -> None:
        name_this_thread("impetus-apple")
        try:
            asyncio.run(self._main())
        except asyncio.CancelledError:
            self._on_event(Failed(EngineFailed("The session was cancelled.")))
        except BaseException as problem:
            self._on_event(Failed(self._error_of(problem)))
        finally:
            with self._lock:
                self._loop = self._task = None

    async def _main(self) -> None:
        with self._lock:
            self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
            if self._is_stopped:
                return
        session, history = await self._open()
        self._prompt_tokens = await self._count_prompt(history)
        if self._is_counted and self._prompt_tokens >= self._context_tokens:
            raise ContextLengthExceeded.of(self._prompt_tokens, self._context_tokens)
        self._on_event(Started(self._prompt_tokens))
        is_full = False
        try:
            await self._answer(session)
        except import_sdk().ExceededContextWindowSizeError:
            if not self._text:
                raise
            is_full = True
        completion = await self._count(self._text) if self._text else 0
        self._on_event(Ended(completion, is_full))

    async def _open(self) -> tuple[Any, Any]:
        """Return the session, and its history for counting tokens."""
        sdk, conversation = import_sdk(), self._request.conversation
        if not conversation.history:
            session = sdk.LanguageModelSession(
                instructions=conversation.instructions or None, model=self._model
            )
            return session, session.transcript if conversation.instructions else None
        return await open_transcript(transcript(conversation), self._model)

    async def _answer(self, session: Any) -> None:
        request = self._request
        if request.forced:
            await self._call(session)
        elif request.schema is not None:
            answer = await self._guided(session, request.conversation.prompt, request.schema)
            self._text = answer.to_json()
            self._on_event(Snapshot(self._text))
        else:
            await self._stream(session)

    async def _stream(self, session: Any) -> None:
        with capture_stream_callbacks(self._on_stream_opened):
            stream = session.stream_response(self._request.conversation.prompt, self._options())
            try:
                async for text in stream:
                    if self._is_stopped:
                        # Snapshots that the SDK received before `end_stream`.
                        continue
                    self._text = text
                    self._on_event(Snapshot(text))
            finally:
                await stream.aclose()

    def _on_stream_opened(self, callback: Any) -> None:
        with self._lock:
            self._stream_callback = callback
            if self._is_stopped:
                end_stream(callback)

    async def _call(self, session: Any) -> None:
        """Have the model choose a tool, if there are several, then generate the arguments."""
        tools, prompt = self._request.forced, self._request.conversation.prompt
        chosen = tools[0]
        if len(tools) > 1:
            names = [tool.name for tool in tools]
            choice = await self._guided(session, prompt, call_schema(names))
            chosen = _chosen_tool(tools, choice.to_json())
            prompt = f"Write the arguments of the call of {chosen.name}."
        arguments = "{}"
        if chosen.schema is not None:
            arguments = (await self._guided(session, prompt, chosen.schema)).to_json()
        self._text = f"{chosen.name} {arguments}"
        self._on_event(ForcedCall(chosen.name, arguments))

    async def _guided(self, session: Any, prompt: str, schema: dict[str, JsonValue]) -> Any:
        return await session.respond(prompt, json_schema=schema, options=self._options())

    def _options(self) -> Any:
        sdk, temperature = import_sdk(), self._request.temperature
        return sdk.GenerationOptions(
            sampling=sdk.SamplingMode.greedy() if temperature == 0 else None,
            temperature=temperature or None,
            maximum_response_tokens=self._request.max_tokens,
        )

    async def _count_prompt(self, history: Any) -> int:
        total = await self._count(self._request.conversation.prompt)
        if history is None:
            return total
        earlier = self._request.conversation.text.removesuffix(self._request.conversation.prompt)
        return total + await self._count(history, earlier)

    async def _count(self, value: Any, text: str | None = None) -> int:
        """Return the system's count of tokens, or an estimate of one token per four bytes.

        Before macOS 26.4 the system cannot count, so that only it enforces the context length.
        `text` is what to estimate from.
        """
        try:
            counted = await asyncio.wait_for(self._model.token_count(value), _COUNT_TIMEOUT_S)
            return int(counted)
        except Exception as problem:
            logger.debug("the system cannot count tokens, estimating: %s", problem)
        self._is_counted = False
        size = len((value if text is None else text).encode())
        return -(-size // _BYTES_PER_TOKEN)

    def _error_of(self, problem: BaseException) -> ImpetusError:
        """Return the error that the request gets; raises nothing, or it would never end."""
        try:
            return self._translate(problem)
        except BaseException as other:
            return request_error(other, "the session of Apple's model", "a request")

    def _translate(self, problem: BaseException) -> ImpetusError:
        if isinstance(problem, ImpetusError):
            return problem
        if isinstance(problem, import_sdk().ExceededContextWindowSizeError):
            tokens = max(self._prompt_tokens, self._context_tokens)
            return ContextLengthExceeded.of(tokens, self._context_tokens)
        error = translate_error(problem, self._request.param)
        if isinstance(error, EngineFailed):
            logger.error("Apple's model failed", exc_info=problem)
        return error


def _chosen_tool(tools: tuple[ForcedTool, ...], choice: str) -> ForcedTool:
    """Return the tool that guided generation chose as `{"name": …}`."""
    try:
        name = json.loads(choice)["name"]
    except (ValueError, KeyError, TypeError):
        name = None
    for tool in tools:
        if tool.name == name:
            return tool
    raise EngineFailed("Apple's model chose a tool that does not exist; try again.")
