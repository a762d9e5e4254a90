"""Tests of the connection checks against the real API with fake engines."""

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from core.errors import EngineFailed
from core.types import (
    Capability,
    GenerationEvent,
    GenerationRequest,
    TextDelta,
    ToolCallDelta,
)
from router.app import create_app
from router.clients.check import CheckFailed, Outcome, check_model_list, checked, run_checks
from router.clients.client import Wire
from router.clients.target import Model, Target
from router.services import EventCallback
from scripts.connect_lib.server import choose, list_models
from tests.fakes import CHAT_MODEL, EMBEDDING_MODEL, FakeDispatcher, finished, make_services
from tests.live_server import serving

CALL = (
    ToolCallDelta(0, "call_1", "get_weather"),
    ToolCallDelta(0, arguments='{"city": "Paris"}'),
    finished("tool_calls"),
)
TEXT = (TextDelta("Hello"), finished())


class Talker(FakeDispatcher):
    """Calls the tool when one must be called, and talks else."""

    def __init__(self, call: Sequence[GenerationEvent] = CALL) -> None:
        super().__init__()
        self.call = call

    async def generate(self, request: GenerationRequest, on_events: EventCallback) -> None:
        is_forced = getattr(request.prompt, "tool_choice", "auto") != "auto"
        self.script = self.call if is_forced else TEXT
        await super().generate(request, on_events)


async def checks(wire: Wire, target: Target, model: Model) -> list[Outcome]:
    async with httpx.AsyncClient(timeout=30) as http:
        return [outcome async for outcome in run_checks(http, wire, target, model)]


async def outcomes(
    dispatcher: FakeDispatcher,
    wanted: str | None = CHAT_MODEL,
    wire: Wire = "openai",
    **settings: Any,
) -> list[Outcome]:
    services = make_services(dispatcher, **settings)
    async with serving(create_app(services)) as port:
        target = Target(f"http://127.0.0.1:{port}/v1", settings.get("api_key", ""))
        entries = await asyncio.to_thread(list_models, target)
        return await checks(wire, target, choose(entries, "cline", wanted))


async def test_a_stream_and_a_tool_round_trip_pass() -> None:
    dispatcher = Talker()
    assert await outcomes(dispatcher) == [Outcome("stream"), Outcome("tool round trip")]
    last = dispatcher.requests[-1].prompt
    roles = [message.role for message in last.messages]  # type: ignore[union-attr]
    assert roles == ["user", "assistant", "tool"]


async def test_the_key_is_sent() -> None:
    found = await outcomes(Talker(), api_key="sesame")
    assert [outcome.problem for outcome in found] == ["", ""]


async def test_an_embedding_model_is_asked_for_a_vector() -> None:
    assert await outcomes(FakeDispatcher(), EMBEDDING_MODEL) == [Outcome("embedding")]


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (TEXT, "called no tool"),
        ((ToolCallDelta(0, "c", "other", "{}"), finished("tool_calls")), "does not match"),
        ((ToolCallDelta(0, "c", "get_weather", "{"), finished("length")), "unexpected format"),
    ],
)
async def test_a_wrong_call_is_told(call: Sequence[GenerationEvent], problem: str) -> None:
    found = await outcomes(Talker(call))
    assert found[0] == Outcome("stream")
    assert problem in found[1].problem


async def test_errors_are_told_in_the_servers_words() -> None:
    before, after = await outcomes(FakeDispatcher(EngineFailed("no engine")))
    assert before.problem == after.problem == "HTTP 503: no engine"
    inside, _ = await outcomes(FakeDispatcher(TextDelta("He"), EngineFailed("it died")))
    assert inside.problem == "an error in the stream: it died"


async def test_a_stream_and_a_tool_round_trip_pass_in_anthropics_api() -> None:
    app = create_app(make_services(Talker()))
    if not any(getattr(route, "path", "") == "/v1/messages" for route in app.routes):
        pytest.skip("this server has no /v1/messages")
    async with serving(app) as port:
        target = Target(f"http://127.0.0.1:{port}/v1")
        model = Model(CHAT_MODEL, 2048, frozenset({Capability.CHAT}))
        found = await checks("anthropic", target, model)
    assert found == [Outcome("stream"), Outcome("tool round trip")]


async def test_a_stream_and_a_tool_round_trip_pass_as_codex_makes_them() -> None:
    dispatcher = Talker()
    found = await outcomes(dispatcher, wire="responses")
    assert found == [Outcome("stream"), Outcome("tool round trip")]
    prompts = [request.prompt for request in dispatcher.requests]
    tools = [tool.name for tool in prompts[0].tools]  # type: ignore[union-attr]
    assert tools == ["get_weather", "multi_agent_v1__close_agent", "apply_patch"]
    roles = [message.role for message in prompts[-1].messages]  # type: ignore[union-attr]
    assert roles == ["user", "assistant", "tool"]


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (TEXT, "called no tool"),
        ((ToolCallDelta(0, "c", "other", "{}"), finished("tool_calls")), "does not match"),
        ((ToolCallDelta(0, "c", "get_weather", "{"), finished("length")), "unexpected format"),
    ],
)
async def test_a_wrong_call_is_told_in_the_responses_api(
    call: Sequence[GenerationEvent], problem: str
) -> None:
    found = await outcomes(Talker(call), wire="responses")
    assert found[0] == Outcome("stream")
    assert problem in found[1].problem


async def test_errors_of_the_responses_api_are_told_in_the_servers_words() -> None:
    before, after = await outcomes(FakeDispatcher(EngineFailed("no engine")), wire="responses")
    assert before.problem == after.problem == "HTTP 503: no engine"
    died = FakeDispatcher(TextDelta("He"), EngineFailed("it died"))
    inside, _ = await outcomes(died, wire="responses")
    assert inside.problem == "the response failed: it died"


async def test_a_server_without_the_messages_api_fails_the_anthropic_checks() -> None:
    async with serving(create_app(make_services())) as port:
        target = Target(f"http://127.0.0.1:{port}/nothing/v1")
        model = Model(CHAT_MODEL, 2048, frozenset({Capability.CHAT}))
        found = await checks("anthropic", target, model)
    assert [outcome.name for outcome in found] == ["stream", "tool round trip"]
    assert all(outcome.problem.startswith("HTTP 404") for outcome in found)


async def test_a_check_ends_in_time_and_says_how_long_it_took() -> None:
    found = await checked("stream", asyncio.sleep(30), 0.05)
    assert found.problem == "no complete answer within 0.05 s; is the model being loaded?"
    assert 40 <= found.ms < 5000


async def test_the_model_list_must_have_the_model() -> None:
    async with serving(create_app(make_services())) as port, httpx.AsyncClient() as http:
        target = Target(f"http://127.0.0.1:{port}/v1")
        for name in (CHAT_MODEL, CHAT_MODEL.partition("@")[0]):
            await check_model_list(http, target, Model(name, 2048, frozenset({"chat"})))
        with pytest.raises(CheckFailed, match="does not have the model other"):
            await check_model_list(http, target, Model("other", 2048, frozenset({"chat"})))
