"""Answers and tool calls that a grammar bounds, on every token-level backend."""

import asyncio
import json
import re

import pytest

from backends.base import Engine
from core.errors import RequestError, RequestFailed
from core.types import (
    ChoiceOutput,
    JsonOutput,
    JsonValue,
    RegexOutput,
    Tool,
    ToolCallDelta,
)
from tests.models import VARIANTS
from tests.requests import chat, end_of, request, run, text_of

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    # The one possible answer of the echo model cannot be bounded.
    pytest.mark.parametrize(
        "variant", [name for name in VARIANTS if name != "echo"], scope="session", indirect=True
    ),
]

SCHEMA: dict[str, JsonValue] = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = Tool("weather", "Look up the weather.", SCHEMA)


async def test_a_schema_bounds_the_answer(engine: Engine) -> None:
    events = await run(engine, request(chat("Where?"), output=JsonOutput(SCHEMA), max_tokens=60))
    answer = json.loads(text_of(events))
    assert answer["city"] in ("Oslo", "Rome")
    assert type(answer["days"]) is int
    assert end_of(events).reason == "stop"


async def test_a_regex_and_choices_bound_answers_side_by_side(engine: Engine) -> None:
    number = RegexOutput("[0-9]{3}-[a-z]{2}", "guided_regex")
    color = ChoiceOutput(("red wine", "grünes Gras"), "guided_choice")
    wanted = [request(chat("Say it."), output=output, max_tokens=40) for output in (number, color)]
    free = request(chat("Say it."), max_tokens=8)
    first, second, _ = await asyncio.gather(*(run(engine, one) for one in (*wanted, free)))
    assert re.fullmatch(number.pattern, text_of(first))
    assert text_of(second) in color.choices


async def test_a_forced_call_is_valid(engine: Engine) -> None:
    prompt = chat("What is the weather?", tools=(WEATHER,), tool_choice="required")
    events = await run(engine, request(prompt, max_tokens=80))
    calls = [event for event in events if isinstance(event, ToolCallDelta)]
    assert calls[0].name == "weather"
    arguments = json.loads("".join(call.arguments for call in calls))
    assert arguments["city"] in ("Oslo", "Rome")
    assert end_of(events).reason == "tool_calls"
    assert end_of(events).mismatches == ()


async def test_i5_a_bad_grammar_is_refused_and_the_engine_goes_on(engine: Engine) -> None:
    bad = (
        RegexOutput("foo**", "guided_regex"),
        JsonOutput({"$ref": "#"}),
        JsonOutput({"type": "text"}),
        JsonOutput({"enum": ["x" * 1_000_000]}),
    )
    for output in bad:
        with pytest.raises(RequestError):
            await run(engine, request(chat("hi"), output=output))
    bomb = RegexOutput("((a{1,1000}){1,1000}){1,1000}b", "guided_regex")
    # Whether it becomes too complex depends on the tokens; the engine outlives it either way.
    bombed = run(engine, request(chat("hi"), output=bomb, max_tokens=50))
    (outcome,) = await asyncio.gather(bombed, return_exceptions=True)
    if isinstance(outcome, BaseException):
        assert isinstance(outcome, RequestError | RequestFailed)
        assert re.search("complex|enforced", outcome.message)
    else:
        assert re.fullmatch("a+b?", text_of(outcome))
    assert engine.load().running == 0
    events = await run(engine, request(chat("hi"), max_tokens=2))
    assert end_of(events).usage.completion_tokens >= 1
