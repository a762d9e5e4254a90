"""Arbitrary events through every API: nothing raises, all is valid JSON, both forms agree."""

import asyncio
import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.errors import EngineFailed
from core.types import (
    CacheOutcome,
    Finished,
    GenerationRequest,
    PrefillProgress,
    ReasoningDelta,
    TextDelta,
    Timing,
    TokenLogprob,
    ToolCallDelta,
    Usage,
)
from router.app import create_app
from router.services import EventCallback
from router.v1.chat.endpoint import ChatChunks
from router.v1.completions import CompletionChunks
from router.v1.messages.stream import MessageEvents
from router.v1.responses.stream import ResponseEvents
from tests.fakes import FakeDispatcher, finished, make_services
from tests.live_server import client_of, connection, post_bytes, serving

MESSAGES = [{"role": "user", "content": "hi"}]
CHAT: dict[str, Any] = {"model": "tiny", "messages": MESSAGES}
APIS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", CHAT, {"stream_options": {"include_usage": True}}),
    "chat logprobs": (
        "/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 1},
        {"stream_options": {"include_usage": True}},
    ),
    "completions": (
        "/v1/completions", {"model": "tiny", "prompt": "hi", "logprobs": 1},
        {"stream_options": {"include_usage": True}},
    ),
    "messages": ("/v1/messages", {**CHAT, "max_tokens": 99}, {}),
    "messages hidden": (
        "/v1/messages",
        {**CHAT, "max_tokens": 2000,
         "thinking": {"type": "enabled", "budget_tokens": 1024, "display": "omitted"}},
        {},
    ),
    "responses": ("/v1/responses", {
        "model": "tiny", "input": "hi", "top_logprobs": 1,
        "include": ["reasoning.encrypted_content"],
    }, {}),
}  # fmt: skip

TEXTS = st.text(max_size=6) | st.sampled_from(
    ("", " ", "\n\n", "\0", "\u2028", "\ud83d", "\ude00", "\ud83d\ude00", "😀", "data: [DONE]\n\n",
     "\\ud800", '"', "x" * 5000, '{"a":', "1e999", "NaN",
     "[" * 3000, '{"a":1e999}', '{"a":"\\ud800"}')
)  # fmt: skip
NUMBERS = st.integers(-1, 9) | st.sampled_from((10**30, -(10**30), 2**63))
FLOATS = st.floats() | st.just(-1.0)
LOGPROBS = st.lists(
    st.builds(
        TokenLogprob, st.integers(0, 9), st.binary(max_size=4), FLOATS,
        st.lists(st.builds(TokenLogprob, st.integers(0, 9), st.binary(max_size=4), FLOATS),
                 max_size=2).map(tuple),
    ),
    max_size=2,
).map(tuple)  # fmt: skip
ENDS = st.builds(
    Finished,
    st.sampled_from(("stop", "length", "tool_calls")),
    st.builds(Usage, NUMBERS, NUMBERS, NUMBERS, NUMBERS),
    st.builds(Timing, FLOATS, FLOATS, FLOATS, FLOATS, FLOATS, st.lists(TEXTS, max_size=2), NUMBERS),
    st.none() | TEXTS,
    st.lists(st.sampled_from(("schema", "malformed", "new")), max_size=2).map(tuple),
    st.none() | st.builds(CacheOutcome, NUMBERS, NUMBERS, NUMBERS, st.none() | st.just("evicted")),
)
EVENTS = st.one_of(
    st.builds(TextDelta, TEXTS, st.just(()), st.just(()) | LOGPROBS),
    st.builds(TextDelta, TEXTS),
    st.builds(ReasoningDelta, TEXTS),
    st.builds(ToolCallDelta, st.integers(0, 2), st.none() | TEXTS, st.none() | TEXTS, TEXTS),
    st.builds(PrefillProgress, NUMBERS, NUMBERS),
    ENDS,
)
BAD: list[Any] = [
    None, object(), "text", TextDelta(5), ReasoningDelta(b"x"), ToolCallDelta(None),  # type: ignore[arg-type]
    ToolCallDelta("0", 5), Finished("new", Usage(1, 1)), Finished("stop", None),  # type: ignore[arg-type]
    Finished("stop", Usage(None, 1)), Finished("stop", Usage(1, 1), None),  # type: ignore[arg-type]
    PrefillProgress("1\n\ndata: x", 2), Finished("cancelled", Usage(1, 1)),  # type: ignore[arg-type]
    EngineFailed("The engine failed."), RuntimeError("bug"),
]  # fmt: skip


class Scripted(FakeDispatcher):
    """Delivers batches of events, and raises the exceptions among them."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: Sequence[Sequence[Any]] = ()

    async def generate(self, request: GenerationRequest, on_events: EventCallback) -> None:
        del request
        for batch in self.batches:
            for event in batch:
                if isinstance(event, Exception):
                    raise event
            on_events(batch)
            await asyncio.sleep(0)


@pytest.fixture
def runner() -> Any:
    """Return a function that posts a body with a script and returns status and text."""
    dispatcher = Scripted()
    app = create_app(make_services(dispatcher))

    async def posted(path: str, body: dict[str, Any]) -> tuple[int, str]:
        async with client_of(app) as client:
            response = await client.post(path, json=body)
        # Strict: raises for anything that is not UTF-8.
        return response.status_code, response.content.decode()

    with asyncio.Runner() as loop:

        def run(api: str, batches: Sequence[Sequence[Any]], *, is_streamed: bool) -> Any:
            dispatcher.batches = batches
            path, body, options = APIS[api]
            fields = {**body, "stream": True, **options} if is_streamed else body
            return loop.run(posted(path, fields))

        yield run


def strict(text: str) -> Any:
    """Parse JSON as the strictest clients do: no NaN, no infinite number, no lone surrogate."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    def finite(number: str) -> float:
        assert math.isfinite(float(number)), number
        return float(number)

    value = json.loads(text, parse_constant=refuse, parse_float=finite)
    json.dumps(value, ensure_ascii=False).encode()
    return value


def events_of(text: str) -> list[Any]:
    """Return the data of an event stream, whose every line is checked."""
    assert text.isascii()
    assert text.endswith("\n\n")
    found: list[Any] = []
    for line in text.split("\n"):
        if line.startswith("data: "):
            found.append(line[6:] if line == "data: [DONE]" else strict(line[6:]))
        else:
            assert not line or line.startswith((":", "event: ")), line
    return found


def chat_answer(events: list[Any]) -> dict[str, Any]:
    """Return the message, finish reason and usage that chat's chunks add up to."""
    assert events[-1] == "[DONE]"
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": {}}
    answer: dict[str, Any] = {"message": message, "logprobs": [], "text": "", "usage": None}
    for event in events[:-1]:
        answer["usage"] = event.get("usage") or answer["usage"]
        for choice in event["choices"]:
            answer["finish_reason"] = choice["finish_reason"]
            answer["text"] += choice.get("text", "")
            logprobs = choice["logprobs"] or {}
            answer["logprobs"] += logprobs.get("content", logprobs.get("tokens", []))
            delta = choice.get("delta", {})
            for name in ("content", "reasoning_content"):
                message[name] += delta.get(name) or ""
            for call in delta.get("tool_calls", ()):
                known = message["tool_calls"].setdefault(call["index"], ["", "", ""])
                function = call["function"]
                known[0] = known[0] or call.get("id", "")
                known[1] = known[1] or function.get("name", "")
                known[2] += function["arguments"]
    return answer


def whole_chat_answer(body: dict[str, Any]) -> dict[str, Any]:
    """Return a whole answer in the form of `chat_answer`."""
    (choice,) = body["choices"]
    message = choice.get("message", {})
    calls = message.get("tool_calls", ())
    logprobs = choice["logprobs"] or {}
    return {
        "message": {
            "content": message.get("content") or "",
            "reasoning_content": message.get("reasoning_content", ""),
            "tool_calls": [
                [call["id"], call["function"]["name"], call["function"]["arguments"]]
                for call in calls
            ],
        },
        "logprobs": logprobs.get("content", logprobs.get("tokens", [])),
        "text": choice.get("text", ""),
        "usage": body["usage"],
        "finish_reason": choice["finish_reason"],
    }


def check_chat(events: list[Any], whole: dict[str, Any]) -> None:
    streamed = chat_answer(events)
    calls = streamed["message"]["tool_calls"]
    streamed["message"]["tool_calls"] = [calls[index] for index in sorted(calls)]
    assert streamed == whole_chat_answer(whole)


def check_messages(events: list[Any], whole: dict[str, Any]) -> None:
    assert [events[0]["type"], events[-1]["type"]] == ["message_start", "message_stop"]
    blocks: list[dict[str, Any]] = []
    inputs: dict[int, str] = {}
    ending = {}
    for event in events[1:-1]:
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(blocks)
                blocks.append(event["content_block"])
            case "content_block_delta":
                delta = {**event["delta"]}
                delta.pop("type")
                ((name, text),) = delta.items()
                if name == "partial_json":
                    inputs[event["index"]] = inputs.get(event["index"], "") + text
                else:
                    blocks[event["index"]][name] += text
            case "message_delta":
                ending = event
    for index, text in inputs.items():
        try:
            value = strict(text)
        except (ValueError, AssertionError, RecursionError):
            value = None
        # Arguments that are no object are shown as text, incomplete ones as far as they go.
        if isinstance(value, dict):
            blocks[index]["input"] = value
        else:
            blocks[index]["input"] = whole["content"][index]["input"]
    assert blocks == whole["content"]
    # The end of a stream has fewer fields of usage; its start has the others.
    assert ending["usage"].items() <= whole["usage"].items()
    started = events[0]["message"]["usage"]
    assert whole["usage"].keys() <= ending["usage"].keys() | started.keys()
    assert ending["delta"]["stop_reason"] == whole["stop_reason"]


def check_responses(events: list[Any], whole: dict[str, Any]) -> None:
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    final = events[-1]["response"]
    assert events[-1]["type"] == f"response.{final['status']}"
    deltas: dict[int, str] = {}
    for event in events:
        if event["type"].endswith(".delta"):
            place = event["output_index"]
            deltas[place] = deltas.get(place, "") + event["delta"]
    for index, item in enumerate(final["output"]):
        text = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert deltas.get(index, "") == text
        item.pop("id")
        whole["output"][index].pop("id")
    for name in ("output", "usage", "status", "incomplete_details"):
        assert final[name] == whole[name]


CHECKS = {
    "chat": check_chat, "chat logprobs": check_chat, "completions": check_chat,
    "messages": check_messages, "messages hidden": check_messages, "responses": check_responses,
}  # fmt: skip
quickly = settings(
    max_examples=50,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("api", APIS)
def test_streamed_and_whole_answers_agree_for_any_events(api: str, runner: Any) -> None:
    @quickly
    @given(st.lists(st.lists(EVENTS, max_size=5), max_size=4), ENDS)
    def check(batches: list[list[Any]], end: Finished) -> None:
        script = [*batches, [end]]
        status, text = runner(api, script, is_streamed=False)
        whole = strict(text)
        assert status == 200, text
        status, text = runner(api, script, is_streamed=True)
        assert status == 200, text
        CHECKS[api](events_of(text), whole)

    check()


@pytest.mark.parametrize("api", APIS)
def test_a_bad_event_becomes_the_apis_error_and_the_stream_ends(api: str, runner: Any) -> None:
    @quickly
    @given(
        st.lists(st.lists(EVENTS.filter(lambda event: not isinstance(event, Finished)))),
        st.sampled_from(BAD),
    )
    def check(batches: list[list[Any]], bad: Any) -> None:
        script = [*batches, [bad], [TextDelta("late")], [finished()]]
        status, text = runner(api, script, is_streamed=False)
        error = strict(text)["error"]
        assert status in (500, 503), text
        status, text = runner(api, script, is_streamed=True)
        if status != 200:
            # No token was sent yet.
            assert strict(text)["error"]["message"].split(",")[0] == error["message"].split(",")[0]
            return
        events = events_of(text)
        if api in ("chat", "chat logprobs", "completions"):
            assert "error" in events[-2]
            assert events[-1] == "[DONE]"
        elif api == "responses":
            assert [events[-2]["type"], events[-1]["type"]] == ["error", "response.failed"]
        else:
            assert events[-1]["type"] == "error"
        assert "late" not in text

    check()


@pytest.mark.parametrize("api", APIS)
def test_an_engine_that_ends_without_a_result_is_an_error(api: str, runner: Any) -> None:
    scripts: list[Any] = [[], [[TextDelta("x")]], [[]], [[PrefillProgress(1, 2)]], [None]]
    for script in scripts:
        status, text = runner(api, script, is_streamed=False)
        assert status in (500, 503)
        assert strict(text)["error"]
        _, text = runner(api, script, is_streamed=True)
        assert "error" in text


def test_a_burst_of_events_is_not_a_slow_client(runner: Any) -> None:
    many = [TextDelta("x")] * 20_000
    for is_streamed in (False, True):
        status, text = runner("chat", [many, [finished()]], is_streamed=is_streamed)
        assert (status, text.count("x") >= 20_000) == (200, True)


def test_names_of_evicted_models_fit_into_a_header(runner: Any) -> None:
    end = Finished("stop", Usage(1, 1), Timing(evicted=('通义"\r\nset-cookie: x', "b")))
    status, _ = runner("chat", [[end]], is_streamed=False)
    assert status == 200


@pytest.mark.parametrize(
    "arguments",
    ['{"a":1e999}', '{"a":-1e999}', '{"a":NaN}', '{"a":"\\ud800"}', '{"a":' + "9" * 5000 + "}",
     '{"a":' + "[" * 10**5, "[" * 10**5, "1", '{"a":1}{', "\ud800", '{"a":1,"a":2}', "{", ""],
)  # fmt: skip
@pytest.mark.parametrize("api", APIS)
def test_arguments_of_any_kind_are_sent(api: str, arguments: str, runner: Any) -> None:
    half = len(arguments) // 2
    call = [ToolCallDelta(0, "call_1", "f"), ToolCallDelta(0, None, None, arguments[:half])]
    script = [call, [ToolCallDelta(0, None, None, arguments[half:])], [finished("tool_calls")]]
    _, text = runner(api, script, is_streamed=False)
    whole = strict(text)
    status, text = runner(api, script, is_streamed=True)
    assert status == 200
    CHECKS[api](events_of(text), whole)


END_MARKS = {
    "/v1/chat/completions": "data: [DONE]\n\n",
    "/v1/completions": "data: [DONE]\n\n",
    "/v1/messages": '"request_id":"',
    "/v1/responses": "event: response.failed\n",
}


@pytest.mark.parametrize("api", ["chat", "completions", "messages", "responses"])
@pytest.mark.parametrize("place", ["chunks", "closing", "failing", "first"])
async def test_a_bug_in_a_formatter_ends_the_stream_with_an_error(
    api: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a real connection, where tokens after the first are written directly."""
    formatter = {
        "chat": ChatChunks, "completions": CompletionChunks,
        "messages": MessageEvents, "responses": ResponseEvents,
    }[api]  # fmt: skip
    calls = 0

    def fail(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if place == "chunks" and calls < 3:
            return original(*arguments)
        raise KeyError("bug")

    name = {"first": "chunks"}.get(place, place)
    original: Any = getattr(formatter, name)
    monkeypatch.setattr(formatter, name, fail)
    gate = asyncio.Event()
    events: list[Any] = [TextDelta("a"), TextDelta("b"), TextDelta("c"), TextDelta("d")]
    script = [*events, EngineFailed("gone")] if place == "failing" else [*events, finished()]
    dispatcher = FakeDispatcher(*script[:1], gate, *script[1:])
    path, body, _ = APIS[api]
    async with (
        serving(create_app(make_services(dispatcher))) as port,
        connection(port) as (reader, writer),
    ):
        writer.write(post_bytes(path, {**body, "stream": True, "logprobs": None}))
        async with asyncio.timeout(30):
            await dispatcher.began.wait()
            if place == "first":
                gate.set()
                head = await reader.readuntil(b"\r\n\r\n")
                assert b" 500 " in head.split(b"\r\n")[0]
                return
            data = b""
            while b'"a"' not in data:
                data += await reader.read(65536)
            gate.set()
            # The chunk of length zero: the body is complete, not cut.
            while not data.endswith(b"\r\n0\r\n\r\n"):
                more = await reader.read(65536)
                assert more, data
                data += more
    text = data.decode()
    assert "error" in text
    if place != "failing":
        assert "internal error, request id" in text
        assert END_MARKS[path] in text
    else:
        assert "gone" in text
