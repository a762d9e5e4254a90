"""What the Apple engine does, with the SDK's own Python code over a scripted model.

The contract of the token-level engines does not apply: there are no tokens to see.
"""

import asyncio
import gc
import json
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio

from backends.apple.backend import AppleFoundationBackend, apple_info
from backends.apple.engine import AppleEngine
from backends.apple.sessions import AppleSession
from backends.base import Engine, EngineOptions
from core.errors import (
    BackendUnavailable,
    ContextLengthExceeded,
    EngineFailed,
    ImpetusError,
    QueueFull,
    RequestError,
    RequestFailed,
    UnsupportedCapability,
    UnsupportedParameter,
)
from core.types import (
    ChatMessage,
    ChatPrompt,
    GenerationEvent,
    GenerationRequest,
    JsonOutput,
    TextDelta,
    TokenPrompt,
    Tool,
    ToolCallDelta,
)
from tests.apple_fm_stand_in import bindings
from tests.apple_fm_stand_in.bindings import Model, Silence, Status, Turn
from tests.apple_fm_stand_in.install import stand_in
from tests.requests import chat, end_of, request, run, text_of

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
WEATHER = Tool("weather", "Tell the weather", SCHEMA)
CLOCK = Tool("clock", "Tell the time")
OPTIONS = EngineOptions(max_sequences=2, max_waiting=4)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    """The scripted model, on a system that looks right."""
    monkeypatch.setattr("backends.apple.backend.system_problem", lambda *_: "")
    with stand_in() as model:
        yield model


@pytest_asyncio.fixture
async def engine(model: Model) -> AsyncIterator[Engine]:
    """The engine as the backend opens it."""
    del model
    engine = AppleFoundationBackend().open(apple_info(), OPTIONS)
    yield engine
    await engine.close()


def say(*deltas: str) -> Any:
    """Return a script that gives these pieces."""
    return lambda _: iter(deltas)


def fail(code: int, *deltas: str) -> Any:
    """Return a script that gives these pieces, then fails."""

    def answer(_: Turn) -> Iterator[str]:
        yield from deltas
        raise Status(code)

    return answer


def hang(*deltas: str) -> Any:
    """Return a script that gives these pieces, then nothing more, for ever."""

    def answer(_: Turn) -> Iterator[str]:
        yield from deltas
        raise Silence

    return answer


class Endless:
    """A script that goes on until it is cancelled, a word at a time."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.go_on.set()

    def __call__(self, _: Turn) -> Iterator[str]:
        while True:
            yield "word "
            self.go_on.wait()
            time.sleep(0.005)


def calls_of(events: list[GenerationEvent]) -> list[tuple[str | None, Any]]:
    deltas = [event for event in events if isinstance(event, ToolCallDelta)]
    names = [delta.name for delta in deltas if delta.name is not None]
    arguments = "".join(delta.arguments for delta in deltas)
    return [(name, json.loads(arguments)) for name in names]


async def session_threads_ended() -> None:
    while any(thread.name == "impetus-apple" for thread in threading.enumerate()):
        await asyncio.sleep(0.01)


async def first_text(events: AsyncIterator[GenerationEvent]) -> str:
    event = await anext(events)
    assert isinstance(event, TextDelta)
    return event.text


async def test_snapshots_become_deltas(engine: Engine, model: Model) -> None:
    model.answer = say("Grüße", ", ", "海", "🎈")
    events = await run(engine, request(chat("Say something")))
    assert [e.text for e in events if isinstance(e, TextDelta)] == ["Grüße", ", ", "海", "🎈"]
    assert end_of(events).reason == "stop"
    assert (end_of(events).usage.prompt_tokens, end_of(events).usage.completion_tokens) == (2, 2)


async def test_conversation_is_a_transcript(engine: Engine, model: Model) -> None:
    messages = (
        ChatMessage("system", "Be brief."),
        ChatMessage("user", "one two"),
        ChatMessage("assistant", "three"),
        ChatMessage("user", "four five six"),
    )
    events = await run(engine, request(ChatPrompt(messages)))
    (turn,) = model.turns
    assert turn.prompt == "four five six"
    told = [(entry["role"], entry["contents"][0]["text"]) for entry in turn.entries]
    assert told == [
        ("instructions", "Be brief."),
        ("user", "one two"),
        ("response", "three"),
    ]
    assert end_of(events).usage.prompt_tokens == 8


async def test_instructions_alone_need_no_transcript(engine: Engine, model: Model) -> None:
    messages = (ChatMessage("system", "Be brief."), ChatMessage("user", "Hi"))
    events = await run(engine, request(ChatPrompt(messages)))
    assert [entry["role"] for entry in model.turns[0].entries] == ["instructions"]
    assert end_of(events).usage.prompt_tokens == 3


@pytest.mark.parametrize(
    ("sampling", "options"),
    [
        ({"temperature": 0.0, "seed": 3, "top_k": 4}, {"sampling": {"mode": "greedy"}}),
        ({"temperature": 0.7, "top_p": 1.0}, {"temperature": 0.7}),
        ({"temperature": None}, {}),
    ],
)
async def test_options_reach_the_system(
    engine: Engine, model: Model, sampling: dict[str, Any], options: dict[str, Any]
) -> None:
    await run(engine, request(chat("Hi"), max_tokens=9, **sampling))
    assert model.turns[0].options == {**options, "maximum_response_tokens": 9}


async def test_answer_that_reaches_the_limit_ends_with_length(engine: Engine, model: Model) -> None:
    model.answer = say("a ", "b ", "c")
    assert end_of(await run(engine, request(chat("Hi"), max_tokens=3))).reason == "length"
    assert end_of(await run(engine, request(chat("Hi"), max_tokens=4))).reason == "stop"


async def test_usage_is_estimated_where_the_system_cannot_count(
    engine: Engine, model: Model
) -> None:
    model.can_count = False
    model.answer = say("12345678", "9")
    messages = (ChatMessage("system", "1234567"), ChatMessage("user", "12345"))
    usage = end_of(await run(engine, request(ChatPrompt(messages)))).usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (4, 3)


async def test_stop_string_never_leaks_and_stops_the_system(engine: Engine, model: Model) -> None:
    model.answer = Endless()
    events = await run(engine, request(chat("Hi"), max_tokens=None, stop=["d wor", "x"]))
    assert text_of(events) == "wor"
    assert end_of(events).reason == "stop"
    await asyncio.get_running_loop().run_in_executor(None, model.cancelled.wait)


async def test_closing_the_generator_stops_the_system(engine: Engine, model: Model) -> None:
    model.answer = endless = Endless()
    endless.go_on.clear()
    events = engine.generate(request(chat("Hi"), max_tokens=None))
    assert await first_text(events) == "word "
    assert engine.load().running == 1
    await events.aclose()
    assert engine.load().running == 0
    await session_threads_ended()
    # The system notices late, and calls once more into what Python may have freed.
    gc.collect()
    endless.go_on.set()
    await asyncio.get_running_loop().run_in_executor(None, model.cancelled.wait)
    assert (model.late_calls, model.calls_into_freed_memory) == (1, 0)


async def test_closing_before_the_first_text_frees_the_slot(engine: Engine, model: Model) -> None:
    model.answer = hang()
    tasks = [asyncio.ensure_future(run(engine, request(chat("Hi")))) for _ in range(2)]
    while len(model.turns) < 2:
        await asyncio.sleep(0.01)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    model.answer = say("ok")
    assert text_of(await run(engine, request(chat("Hi")))) == "ok"


async def test_nothing_is_left_behind(engine: Engine, model: Model) -> None:
    history = (ChatMessage("user", "a"), ChatMessage("assistant", "b"), ChatMessage("user", "c"))
    for _ in range(3):
        await run(engine, request(ChatPrompt(history)))
    await engine.close()
    gc.collect()
    assert model.living("session") == model.living("stream") == model.living("task") == 0


async def test_closing_waits_for_a_thread_whose_request_is_over(
    engine: Engine, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    run_session = AppleSession._run

    def run_and_linger(session: AppleSession) -> None:
        run_session(session)
        release.wait(5)

    monkeypatch.setattr(AppleSession, "_run", run_and_linger)
    await run(engine, request(chat("Hi")))
    closing = asyncio.ensure_future(engine.close())
    assert (await asyncio.wait({closing}, timeout=0.1))[0] == set()
    release.set()
    await closing
    assert "impetus-apple" not in {thread.name for thread in threading.enumerate()}
    assert model.living("session") == 0


async def test_more_requests_than_sessions_wait_and_finish(engine: Engine, model: Model) -> None:
    model.answer = say("a ", "b")
    answers = await asyncio.gather(*(run(engine, request(chat(f"{i}"))) for i in range(6)))
    assert [text_of(events) for events in answers] == ["a b"] * 6
    assert engine.load().waiting == 0


async def test_queue_that_is_full_refuses(engine: Engine, model: Model) -> None:
    model.answer = Endless()
    tasks = [
        asyncio.ensure_future(run(engine, request(chat("Hi"), max_tokens=None))) for _ in range(6)
    ]
    while engine.load().waiting < 4:
        await asyncio.sleep(0)
    with pytest.raises(QueueFull):
        await run(engine, request(chat("Hi")))
    await engine.close()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(r, EngineFailed) and "unloaded" in r.message for r in results)


async def test_loop_goes_on_during_a_stream(engine: Engine, model: Model) -> None:
    model.answer = Endless()
    events = engine.generate(request(chat("Hi"), max_tokens=None))
    await anext(events)
    # A stream on this loop would let no other task run until its end, which never comes.
    assert text_of(await run(engine, request(chat("Hi"), max_tokens=None, stop=["d w"]))) == "wor"
    await events.aclose()


async def test_prompt_over_the_context_is_refused_with_both_numbers(engine: Engine) -> None:
    with pytest.raises(ContextLengthExceeded, match=r"4096 tokens.* 5000 tokens"):
        await run(engine, request(chat("word " * 5000)))


async def test_estimate_refuses_no_prompt(engine: Engine, model: Model) -> None:
    model.can_count = False
    model.answer = say("ok")
    events = await run(engine, request(chat("word " * 5000)))
    assert text_of(events) == "ok"
    assert end_of(events).usage.prompt_tokens == 6250


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (bindings.EXCEEDED, ContextLengthExceeded),
        (bindings.ASSETS, BackendUnavailable),
        (bindings.GUARDRAIL, RequestError),
        (bindings.LANGUAGE, RequestError),
        (bindings.DECODING, EngineFailed),
        (bindings.RATE, QueueFull),
        (bindings.CONCURRENT, QueueFull),
        (bindings.REFUSAL, RequestError),
        (bindings.UNKNOWN, EngineFailed),
        (77, EngineFailed),
    ],
)
async def test_errors_of_the_system_become_ours(
    engine: Engine, model: Model, code: int, error: type[ImpetusError]
) -> None:
    model.answer = fail(code)
    with pytest.raises(error) as caught:
        await run(engine, request(chat("Hi")))
    assert type(caught.value) is error
    model.answer = fail(code, "text")
    if code == bindings.EXCEEDED:
        events = await run(engine, request(chat("Hi")))
        assert (text_of(events), end_of(events).reason) == ("text", "length")
    else:
        with pytest.raises(EngineFailed):
            await run(engine, request(chat("Hi")))


async def test_text_that_is_taken_back_fails_the_request(
    engine: Engine, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    import apple_fm_sdk

    async def rewrite(*_: Any) -> AsyncIterator[str]:
        for snapshot in ("one", "one two", "One two"):
            yield snapshot

    monkeypatch.setattr(apple_fm_sdk.LanguageModelSession, "stream_response", rewrite)
    with pytest.raises(EngineFailed, match="took back"):
        await run(engine, request(chat("Hi")))
    assert model.turns == []


async def test_system_that_falls_silent_ends_the_request(model: Model) -> None:
    backend = AppleFoundationBackend()
    import apple_fm_sdk

    engine = AppleEngine(
        backend.built_in()[0],
        apple_fm_sdk.SystemLanguageModel(),
        OPTIONS,
        context_tokens=4096,
        idle_timeout_s=0.3,
    )
    model.answer = hang("some")
    with pytest.raises(EngineFailed, match="Nothing came"):
        await run(engine, request(chat("Hi")))
    with pytest.raises(EngineFailed, match="Nothing came"):
        await run(engine, request(chat("Hi"), output=JsonOutput(SCHEMA)))
    await engine.close()
    await session_threads_ended()
    gc.collect()
    assert model.living("stream") == 0


async def test_deadline_ends_the_request(engine: Engine, model: Model) -> None:
    model.answer = Endless()
    with pytest.raises(EngineFailed, match="longer than"):
        await run(engine, request(chat("Hi"), max_tokens=None, deadline_s=0.05))


async def test_json_schema_guides_the_answer(engine: Engine, model: Model) -> None:
    model.answer = say('{"city": ', '"Köln"}')
    events = await run(engine, request(chat("Where?"), output=JsonOutput(SCHEMA), max_tokens=50))
    assert json.loads(text_of(events)) == {"city": "Köln"}
    (turn,) = model.turns
    assert turn.schema is not None
    assert turn.schema["x-order"] == ["city", "days"]
    assert turn.options == {"sampling": {"mode": "greedy"}, "maximum_response_tokens": 50}


@pytest.mark.parametrize("code", [bindings.GUIDE, bindings.SCHEMA])
async def test_schema_that_the_system_refuses_is_the_requests_fault(
    engine: Engine, model: Model, code: int
) -> None:
    model.answer = fail(code)
    with pytest.raises(UnsupportedParameter) as caught:
        await run(engine, request(chat("Where?"), output=JsonOutput(SCHEMA)))
    assert caught.value.param == "response_format"


async def test_guided_answer_can_be_cancelled(engine: Engine, model: Model) -> None:
    model.answer = Endless()
    task = asyncio.ensure_future(run(engine, request(chat("Hi"), output=JsonOutput(SCHEMA))))
    while not model.turns:
        await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await asyncio.get_running_loop().run_in_executor(None, model.cancelled.wait)
    assert engine.load().running == 0


async def test_tools_are_offered_in_the_text_and_calls_read_from_it(
    engine: Engine, model: Model
) -> None:
    model.answer = say(
        '<tool_call>{"name": "weather", "argu', 'ments": {"city": "Köln"}}</tool_call>'
    )
    events = await run(engine, request(chat("Weather?", tools=(WEATHER, CLOCK))))
    assert calls_of(events) == [("weather", {"city": "Köln"})]
    assert end_of(events).reason == "tool_calls"
    assert '"name": "clock"' in model.turns[0].entries[0]["contents"][0]["text"]
    assert model.turns[0].schema is None


async def test_only_call_that_is_allowed_ends_the_answer(engine: Engine, model: Model) -> None:
    call = '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
    model.answer = say(call, call, "more")
    prompt = chat("Time?", tools=(CLOCK,), parallel_tool_calls=False)
    events = await run(engine, request(prompt))
    assert calls_of(events) == [("clock", {})]
    assert end_of(events).reason == "tool_calls"


async def test_forced_call_is_guided(engine: Engine, model: Model) -> None:
    model.answer = say('{"city": "Köln"}')
    prompt = chat("Weather?", tools=(WEATHER, CLOCK), tool_choice=("function", "weather"))
    events = await run(engine, request(prompt))
    assert calls_of(events) == [("weather", {"city": "Köln"})]
    assert end_of(events).reason == "tool_calls"
    assert [turn.schema is None for turn in model.turns] == [False]


async def test_required_call_is_chosen_then_written(engine: Engine, model: Model) -> None:
    def answer(turn: Turn) -> Iterator[str]:
        assert turn.schema is not None
        is_choice = "name" in turn.schema["properties"]
        yield '{"name": "weather"}' if is_choice else '{"city": "Rom", "days": 2}'

    model.answer = answer
    prompt = chat("Weather?", tools=(CLOCK, WEATHER), tool_choice="required")
    events = await run(engine, request(prompt))
    assert calls_of(events) == [("weather", {"city": "Rom", "days": 2})]
    assert [len(turn.entries) for turn in model.turns] == [1, 3]


async def test_forced_call_without_arguments_asks_for_none(engine: Engine, model: Model) -> None:
    prompt = chat("Time?", tools=(CLOCK,), tool_choice="required")
    events = await run(engine, request(prompt))
    assert calls_of(events) == [("clock", {})]
    assert model.turns == []


async def test_choice_of_no_tool_fails(engine: Engine, model: Model) -> None:
    model.answer = say('{"name": "other"}')
    prompt = chat("Time?", tools=(CLOCK, WEATHER), tool_choice="required")
    with pytest.raises(EngineFailed, match="does not exist"):
        await run(engine, request(prompt))


@pytest.mark.parametrize(
    "wanted", [request("plain text"), request(TokenPrompt((1, 2)))], ids=["text", "tokens"]
)
async def test_plain_prompts_are_refused(engine: Engine, wanted: GenerationRequest) -> None:
    with pytest.raises(UnsupportedCapability):
        await run(engine, wanted)


async def test_model_that_is_not_ready_cannot_be_opened(model: Model) -> None:
    model.is_available, model.reason = False, 2
    backend = AppleFoundationBackend()
    assert "downloading" in backend.availability().reason
    with pytest.raises(BackendUnavailable, match="downloading"):
        backend.open(apple_info(), OPTIONS)


@pytest.mark.macos
@pytest.mark.skipif(sys.platform != "darwin", reason="Apple's model is on macOS only")
async def test_real_model_answers() -> None:
    backend = AppleFoundationBackend()
    availability = backend.availability()
    if not availability.is_available:
        pytest.skip(availability.reason)
    engine = backend.open(apple_info(), OPTIONS)
    events = await run(engine, request(chat("Say hello."), max_tokens=20))
    assert text_of(events)
    assert 0 < end_of(events).usage.completion_tokens <= 20
    await engine.close()


async def test_an_answer_that_cannot_be_read_fails_its_request_alone(
    engine: Engine, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_to_push(_: object, text: str) -> list[Any]:
        raise RecursionError(text)

    model.answer = say("Hello", " there")
    with monkeypatch.context() as patch:
        patch.setattr("backends.apple.engine.StopMatcher.push", fail_to_push)
        with pytest.raises(RequestFailed, match="RecursionError"):
            await run(engine, request(chat("hi")))
    assert text_of(await run(engine, request(chat("hi")))) == "Hello there"
    assert engine.load().running == 0


@pytest.mark.parametrize("method", ["__init__", "start", "cancel"])
async def test_a_session_that_fails_keeps_no_slot(
    engine: Engine, model: Model, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def fail_at_once(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    model.answer = say("Hello")
    with monkeypatch.context() as patch:
        patch.setattr(AppleSession, method, fail_at_once)
        for _ in range(OPTIONS.max_sequences + 1):
            (result,) = await asyncio.gather(
                run(engine, request(chat("hi"))), return_exceptions=True
            )
            assert isinstance(result, RequestFailed) == (method != "cancel")
    assert text_of(await run(engine, request(chat("hi")))) == "Hello"
    assert engine.load().running == 0


async def test_an_error_that_cannot_be_translated_ends_its_request(
    engine: Engine, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_to_translate(*_: object) -> ImpetusError:
        raise KeyError("unknown")

    monkeypatch.setattr("backends.apple.sessions.translate_error", fail_to_translate)
    model.answer = fail(3)
    with pytest.raises(RequestFailed, match="KeyError"):
        await run(engine, request(chat("hi")))
