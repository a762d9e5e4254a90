"""Tests of tool calls through a whole engine, one byte per token."""

import json
from collections.abc import AsyncIterator

import pytest

from backends.base import Engine, EngineOptions
from backends.echo import EchoBackend, echo_info
from backends.tool_calls.families import FAMILIES
from core.errors import UnsupportedParameter
from core.types import (
    ChatMessage,
    ChatPrompt,
    Finished,
    GenerationRequest,
    JsonOutput,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
)
from tests.tool_forms import TOOLS, Answer, written

pytestmark = pytest.mark.asyncio


@pytest.fixture
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[Engine]:
    """Return an engine that says what it is asked, as a model of the family."""
    opened = EchoBackend().open(echo_info(), EngineOptions(tool_parser=request.param))
    yield opened
    await opened.close()


async def said(engine: Engine, text: str) -> tuple[str, list[tuple[str, str]], Finished]:
    prompt = ChatPrompt((ChatMessage("user", text),), tools=TOOLS)
    content, calls, tokens = "", list[tuple[str, str]](), list[int]()
    async for event in engine.generate(GenerationRequest("r", "echo", prompt)):
        match event:
            case TextDelta() | ReasoningDelta():
                event.text.encode()
                content += event.text if isinstance(event, TextDelta) else ""
                tokens += event.token_ids
            case ToolCallDelta():
                tokens += event.token_ids
                if event.name is not None:
                    calls.append((event.name, ""))
                calls[-1] = (calls[-1][0], calls[-1][1] + event.arguments)
            case Finished():
                assert bytes(tokens[:-1]).decode() == text
                return content, calls, event
    raise AssertionError("no end")


@pytest.mark.parametrize("engine", FAMILIES, indirect=True)
async def test_s1_characters_split_over_tokens_arrive_whole(
    engine: Engine, request: pytest.FixtureRequest
) -> None:
    family = request.node.callspec.params["engine"]
    arguments = {"path": "日本/🦉 ñ.txt", "text": "e\u0301 🇨🇭\n'\"", "lines": ["ß", "🎈"]}
    text, calls, end = await said(
        engine, written(family, Answer([("edit_file", arguments)], text="Löwe 🦁"))
    )
    assert text == "Löwe 🦁"
    assert [(name, json.loads(value)) for name, value in calls] == [("edit_file", arguments)]
    assert end.reason == "tool_calls"
    assert end.mismatches == ()


@pytest.mark.parametrize("engine", FAMILIES, indirect=True)
async def test_i10_a_malformed_call_ends_and_frees_its_slot(
    engine: Engine, request: pytest.FixtureRequest
) -> None:
    family = request.node.callspec.params["engine"]
    raw = written(family, Answer([("edit_file", {"path": "a", "lines": ["b"]})]))
    for broken in (raw[: len(raw) // 2], raw.replace('"', "'").replace(">", "", 1), raw[:-4] * 2):
        _, _, end = await said(engine, broken)
        assert end.reason in ("stop", "tool_calls")
        assert engine.load().running == 0
    _, calls, _ = await said(engine, raw)
    assert [name for name, _ in calls] == ["edit_file"]


@pytest.mark.parametrize("engine", ["hermes"], indirect=True)
async def test_mismatches_end_with_the_answer(engine: Engine) -> None:
    _, calls, end = await said(
        engine, written("hermes", Answer([("edit_file", {"count": "many"}), ("gone", {})]))
    )
    assert calls == [("edit_file", '{"count":"many"}')]
    assert end.mismatches == ("schema", "undeclared")


@pytest.mark.parametrize("engine", ["hermes"], indirect=True)
async def test_a_tokenizer_without_grammars_refuses_what_needs_one(engine: Engine) -> None:
    wanted = GenerationRequest(
        "r", "echo", ChatPrompt((ChatMessage("user", "hi"),)), output=JsonOutput()
    )
    with pytest.raises(UnsupportedParameter):
        await anext(engine.generate(wanted))
