"""Tests of chat formats: rendered prompts, parsed answers, and forced grammars."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher

from backends.answer.parser import OutputParser
from backends.answer.reasoning import ReasoningParser
from backends.prompt.chat_format import ChatFormat
from backends.tool_calls.families import FAMILIES
from backends.tool_calls.grammar import call_constraint
from core.errors import RequestError, TemplateRefused
from core.types import (
    ChatMessage,
    ChatPrompt,
    JsonOutput,
    ReasoningDelta,
    TextDelta,
    Tool,
    ToolCall,
    ToolCallDelta,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}]"
    "{{ m.content }}{% for c in m.tool_calls %}<tool_call>{{ c.function.name }} "
    "{{ c.function.arguments.city }}{% endfor %}{% endfor %}"
)
STRICT = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"
    "{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
)
PARTS = (
    "{% for m in messages %}{% for part in m['content'] %}{{ part.text }}{% endfor %}{% endfor %}"
)
WEATHER = Tool("get_weather", "Weather of a city.", {"type": "object", "properties": {"city": {}}})
TIME = Tool("get_time")
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern"}}\n</tool_call>'


@pytest.fixture
def chat() -> Iterator[Callable[[str | None], ChatFormat]]:
    made: list[ChatFormat] = []

    def make(template: str | None) -> ChatFormat:
        made.append(ChatFormat(template, "<s>", "</s>"))
        return made[-1]

    yield make
    for form in made:
        form.close()


Make = Callable[[str | None], ChatFormat]


def say(*contents: str, tools: Sequence[Tool] = (), **more: object) -> ChatPrompt:
    """Return a prompt; `system: …` and so on give a message another role than the user's."""
    messages = []
    for content in contents:
        role, _, text = content.rpartition(": ")
        messages.append(ChatMessage(role or "user", text))  # type: ignore[arg-type]
    return ChatPrompt(tuple(messages), tools=tuple(tools), **more)  # type: ignore[arg-type]


def calling(arguments: str) -> tuple[ChatMessage, ...]:
    return (
        ChatMessage("user", "hi"),
        ChatMessage("assistant", "", tool_calls=(ToolCall("c1", "get_weather", arguments),)),
        ChatMessage("tool", "rain", tool_call_id="c1"),
        ChatMessage("tool", "snow", tool_call_id="c2"),
    )


def test_render_uses_the_template(chat: Make) -> None:
    assert chat(CHATML + "{{ bos_token }}{{ eos_token }}").render(say("hi")) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<s></s>"
    )


def test_render_passes_template_kwargs(chat: Make) -> None:
    prompt = say("hi", template_kwargs={"enable_thinking": False})
    assert chat("{{ enable_thinking }}").render(prompt) == "False"


@pytest.mark.parametrize("name", ["messages", "chat_template", "tokenize"])
def test_render_refuses_reserved_template_kwargs(chat: Make, name: str) -> None:
    with pytest.raises(RequestError, match=name):
        chat(CHATML).render(say("hi", template_kwargs={name: "x"}))


def test_render_gives_tools_and_calls_to_a_template_that_knows_them(chat: Make) -> None:
    prompt = ChatPrompt(calling('{"city": "Bern"}'), tools=(WEATHER,))
    text = chat(WITH_TOOLS).render(prompt)
    listed, _, rest = text.partition("[user]")
    assert json.loads(listed)[0]["function"]["parameters"] == dict(WEATHER.parameters)
    assert rest == "hi[assistant]<tool_call>get_weather Bern[tool]rain[tool]snow"


def test_render_tool_choice_none_offers_nothing(chat: Make) -> None:
    prompt = say("hi", tools=[WEATHER], tool_choice="none")
    assert chat(WITH_TOOLS).render(prompt) == "[user]hi"
    assert "get_weather" not in chat(CHATML).render(prompt)


def test_render_writes_tools_for_a_template_that_knows_none(chat: Make) -> None:
    prompt = ChatPrompt(calling('{"city": "Bern"}'), tools=(WEATHER,))
    text = chat(CHATML).render(prompt)
    listed = re.search(r"<tools>\n(.*)\n</tools>", text)
    assert listed is not None
    assert json.loads(listed[1])[0]["function"]["name"] == "get_weather"
    assert text.startswith("<|im_start|>system\n")
    assert CALL in text
    assert (
        "<|im_start|>user\n<tool_response>\nrain\n</tool_response>\n"
        "<tool_response>\nsnow\n</tool_response><|im_end|>"
    ) in text


@pytest.mark.parametrize("arguments", ["", "{bad", "[1]"])
def test_render_takes_any_arguments_of_the_history(chat: Make, arguments: str) -> None:
    assert "rain" in chat(CHATML).render(ChatPrompt(calling(arguments)))


def test_render_folds_messages_that_the_template_refuses(chat: Make) -> None:
    prompt = say("system: be brief", "hi", "more", "assistant: yes", "end")
    assert chat(STRICT).render(prompt) == "[user]be brief\n\nhi\n\nmore[assistant]yes[user]end"


def test_render_repeats_the_templates_own_words_when_nothing_helps(chat: Make) -> None:
    refusing = STRICT + "{% if messages | length %}{{ raise_exception('no') }}{% endif %}"
    with pytest.raises(TemplateRefused, match="no system role"):
        chat(refusing).render(say("system: be brief", "hi"))


def test_render_gives_parts_to_a_template_that_iterates_content(chat: Make) -> None:
    assert chat(PARTS).render(say("hi")) == "hi"


def test_render_without_template_is_plain_text(chat: Make) -> None:
    form = chat(None)
    text = form.render(say("system: be brief", "hi", "assistant: yes", "end"))
    assert text == "System: be brief\n\nUser: hi\nAssistant: yes\nUser: end\nAssistant:"
    assert form.stop == ("\nUser:",)


def test_parser_is_none_where_text_is_plain(chat: Make) -> None:
    assert chat(CHATML).parser(say("hi"), "rendered") is None
    assert chat(CHATML).parser(say("hi", tools=[TIME], tool_choice="none"), "") is None


def split(parser: OutputParser, *parts: str) -> tuple[str, str, list[tuple[str, str]]]:
    """Return answer, reasoning and (name, arguments) calls, checking the calls' order."""
    pieces = [piece for part in parts if not parser.is_done for piece in parser.push(part)]
    pieces += parser.flush()
    calls: list[tuple[str, str]] = []
    for piece in pieces:
        if isinstance(piece, ToolCallDelta):
            if piece.name is not None:
                assert re.fullmatch(r"call_[0-9A-Za-z]{24}", piece.id or "")
                assert piece.index == len(calls)
                calls.append((piece.name, ""))
            assert piece.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.arguments)
    text = "".join(piece.text for piece in pieces if isinstance(piece, TextDelta))
    thought = "".join(piece.text for piece in pieces if isinstance(piece, ReasoningDelta))
    return text, thought, calls


def call_parser(*, is_parallel: bool = True) -> OutputParser:
    return FAMILIES["hermes"].parser((WEATHER, TIME), is_parallel=is_parallel)


def full_parser(*, is_open: bool = False, is_parallel: bool = True) -> OutputParser:
    return ReasoningParser(call_parser(is_parallel=is_parallel), is_open=is_open)


BERN = ("get_weather", '{"city":"Bern"}')
ANSWERS = {
    "plain": ("Just <b>text</b> and < signs.", ("Just <b>text</b> and < signs.", "", [])),
    "spaces": ("\n  a ", ("\n  a ", "", [])),
    "reasoning": ("<think>\nhm <b>\n</think>\n\nYes", ("Yes", "hm <b>", [])),
    "late tag": ("The <think> tag", ("The <think> tag", "", [])),
    "unclosed reasoning": ("<think>hm </thi", ("", "hm </thi", [])),
    "empty reasoning": ("<think>\n\n</think>\n\nYes", ("Yes", "", [])),
    "two thoughts": ("<think>a</think>\n<think>b</think>c", ("c", "ab", [])),
    "call": (CALL, ("", "", [BERN])),
    "reasoning and call": (f"<think>a</think>\n{CALL}", ("", "a", [BERN])),
    "call in reasoning": (f"<think>{CALL}", ("", CALL, [])),
    "prose and call": (f"I look.\n\n{CALL}\n", ("I look.", "", [BERN])),
    "two calls": (f"{CALL}\n{CALL}", ("", "", [BERN, BERN])),
    "call and prose": (f"{CALL}\nDone", ("Done", "", [BERN])),
    "missing end": (CALL.removesuffix("</tool_call>"), ("", "", [BERN])),
    "missing brace": (CALL.removesuffix("}\n</tool_call>"), ("", "", [BERN])),
    "no arguments": ('<tool_call>{"name": "get_time"}</tool_call>', ("", "", [("get_time", "{}")])),
    "arguments first": (
        '<tool_call>{"arguments": {"city": "Bern"}, "name": "get_weather"}</tool_call>',
        ("", "", [BERN]),
    ),
    "quoted arguments": (
        '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Bern\\"}"}</tool_call>',
        ("", "", [BERN]),
    ),
    "nested": (
        '<tool_call>{"name":"get_time","arguments":{"a":[1, -2.5e3,{"b" :null}],'
        '"c":"\\u00e9\\"}\\n"}}</tool_call>',
        ("", "", [("get_time", '{"a":[1,-2.5e3,{"b":null}],"c":"\\u00e9\\"}\\n"}')]),
    ),
    "raw line break": (
        '<tool_call>{"name":"get_time","arguments":{"a":"x\ny"}}</tool_call>',
        ("", "", [("get_time", '{"a":"x\\ny"}')]),
    ),
    "unfinished arguments": (
        '<tool_call>{"name":"get_time","arguments":{"a": "x", "b": 12',
        ("", "", [("get_time", '{"a":"x","b":12')]),
    ),
    "bare": ('{"name": "get_weather", "parameters": {"city": "Bern"}}', ("", "", [BERN])),
    "bare typed": (
        '{"type": "function", "name": "get_weather", "parameters": {"city": "Bern"}}\n',
        ("", "", [BERN]),
    ),
    "bare in fence": (
        '```json\n{"name": "get_weather", "arguments": {"city": "Bern"}}\n```',
        ("", "", [BERN]),
    ),
    "bare after tag": (
        '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Bern"}}',
        ("", "", [BERN]),
    ),
}  # fmt: skip
TEXTS = {
    "undeclared": '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
    "malformed": '<tool_call>{"name": "get_time", arguments: {}}</tool_call> and on',
    "no object": "<tool_call>get_time()</tool_call>",
    "unnamed": '<tool_call>{"arguments": {}}</tool_call>',
    "bad arguments": '<tool_call>{"name": "get_time", "arguments": 3}</tool_call>',
    "unfinished": '<tool_call>{"name": "get_ti',
    "half a tag": "So <tool_c",
    "malformed within prose": "Use\n <tool_call> {oops} now",
    "bare in prose": 'Use {"name": "get_time", "parameters": {}}',
    "bare before prose": '{"name": "get_time", "parameters": {}} does it',
    "bare undeclared": '{"name": "rm", "parameters": {}}',
    "other json": '{"temperature": 3, "name": "get_time"}',
    "bare unfinished": '{"name": "get_time", "parameters": {"a": 1}',
    "code": "```python\nprint(1)\n```",
    "list": '[{"name": "get_time"}]',
}


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("name", ANSWERS)
def test_parser_splits_answers_however_they_arrive(name: str, size: int) -> None:
    answer, expected = ANSWERS[name]
    parts = [answer[i : i + size] for i in range(0, len(answer), size)]
    assert split(full_parser(), *parts) == expected


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("name", TEXTS)
def test_parser_gives_back_as_text_what_is_no_call(name: str, size: int) -> None:
    answer = TEXTS[name]
    parts = [answer[i : i + size] for i in range(0, len(answer), size)]
    assert split(full_parser(), *parts) == (answer, "", [])


def test_parser_malformed_call_does_not_hide_the_next_one() -> None:
    broken = "<tool_call>{oops}</tool_call>"
    assert split(full_parser(), f"{broken}\n{CALL}") == (broken, "", [BERN])


def test_parser_broken_arguments_lose_nothing() -> None:
    answer = '<tool_call>{"name": "get_time", "arguments": {"a": 1, "b": 2x}}</tool_call>'
    for parts in ([answer], list(answer)):
        text, _, calls = split(full_parser(), *parts)
        assert calls == [("get_time", '{"a":1,"b":')]
        assert text == "2x}}</tool_call>"


def test_parser_streams_arguments_as_they_grow() -> None:
    parser = call_parser()
    pieces = [
        parser.push(part)
        for part in ('<tool_call>{"name": "get_time", "arg', 'uments": {"a": "x', "y", '"}}')
    ]
    first, second = pieces[1]
    assert isinstance(first, ToolCallDelta)
    assert (first.name, first.arguments) == ("get_time", "")
    assert second == ToolCallDelta(0, arguments='{"a":"x')
    assert pieces[0] == []
    assert pieces[2:] == [
        [ToolCallDelta(0, arguments="y")],
        [ToolCallDelta(0, arguments='"}')],
    ]


def test_parser_without_parallel_calls_is_done_after_the_first() -> None:
    parser = full_parser(is_parallel=False)
    assert split(parser, CALL, CALL) == ("", "", [BERN])
    assert parser.is_done


def test_parser_implicit_opener_makes_the_beginning_reasoning(chat: Make) -> None:
    form = chat(CHATML + "<think>\n")
    parser = form.parser(say("hi"), form.render(say("hi")))
    assert parser is not None
    assert split(parser, "hm\n</thi", "nk>\n\nYes") == ("Yes", "hm", [])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(
    arguments=st.dictionaries(st.text(max_size=4), JSON, max_size=4),
    indent=st.sampled_from([None, 1]),
    is_ascii=st.booleans(),
    size=st.integers(1, 9),
)
def test_parser_arguments_keep_their_value(
    arguments: dict[str, object], indent: int | None, is_ascii: bool, size: int
) -> None:
    call = {"name": "get_time", "arguments": arguments}
    answer = f"<tool_call>{json.dumps(call, indent=indent, ensure_ascii=is_ascii)}</tool_call>"
    parts = [answer[i : i + size] for i in range(0, len(answer), size)]
    text, _, calls = split(full_parser(), *parts)
    assert text == ""
    assert [(name, json.loads(written)) for name, written in calls] == [("get_time", arguments)]


@given(st.lists(st.sampled_from([*"<>{}[]\",:1 \n\\", "tool_call", "think", "/", "name", "get_time",
    "arguments", "true", "```", "<tool_call>", '{"name":"get_time","arguments":{', "}}"]),
    max_size=30))  # fmt: skip
def test_parser_never_fails_and_splits_alike(words: list[str]) -> None:
    answer = "".join(words)
    assert split(full_parser(), *words) == split(full_parser(), answer)


def test_constraint_is_none_for_a_free_answer(chat: Make) -> None:
    assert chat(CHATML).constraint(say("hi", tools=[TIME])) is None


def test_constraint_forced_call_names_the_chosen_tool_alone(chat: Make) -> None:
    prompt = say("hi", tools=[TIME, WEATHER], tool_choice=("function", "get_time"))
    constraint = chat(CHATML).constraint(prompt)
    assert constraint is not None
    assert "get_time" in constraint.grammar
    assert "get_weather" not in constraint.grammar


def test_constraint_lets_reasoning_go_first(chat: Make) -> None:
    form = chat(CHATML + "<think>\n")
    constraint = form.constraint(say("hi"), JsonOutput(), form.render(say("hi")))
    assert constraint is not None
    assert constraint == form.constraint(say("hi"), JsonOutput())
    assert constraint.markers == ("</think>",)
    assert constraint.grammar.startswith("start: until0 answer")


def test_constraint_of_bare_calls_compiles(chat: Make) -> None:
    form = chat(WITH_TOOLS.replace("<tool_call>", "<|python_tag|>"))
    constraint = form.constraint(say("hi", tools=[TIME], tool_choice="required"), None, "")
    assert constraint is not None
    assert constraint.markers == ()
    assert not LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(constraint.grammar))


@pytest.mark.parametrize(
    ("choice", "is_parallel", "allows_several"),
    [
        ("required", True, True),
        ("required", None, False),
        ("required", False, False),
        (("function", "get_time"), True, False),
    ],
)
def test_constraint_allows_several_calls_only_where_they_were_asked_for(
    chat: Make, choice: Any, is_parallel: bool | None, allows_several: bool
) -> None:
    prompt = say("hi", tools=[TIME], tool_choice=choice, parallel_tool_calls=is_parallel)
    form = chat(WITH_TOOLS)
    expected = call_constraint(form.family, [TIME], allows_several=allows_several)
    assert form.constraint(prompt, None, "") == expected


@pytest.mark.parametrize(
    "prompt",
    [
        say("hi", tool_choice="required"),
        say("hi", tools=[TIME], tool_choice=("function", "gone")),
    ],
)
def test_constraint_impossible_choice_is_refused(chat: Make, prompt: ChatPrompt) -> None:
    with pytest.raises(RequestError) as caught:
        chat(CHATML).constraint(prompt)
    assert caught.value.param == "tool_choice"


def test_constraint_of_a_forced_call_ignores_the_format(chat: Make) -> None:
    form, prompt = chat(CHATML), say("hi", tools=[TIME], tool_choice="required")
    assert form.constraint(prompt, JsonOutput(), "") == form.constraint(prompt, None, "")
