"""Templates with the rules of well-known models render whatever lies in a history."""

import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from backends.prompt.chat_format import ChatFormat
from core.errors import TemplateRefused
from core.types import ChatMessage, ChatPrompt, Tool, ToolCall

TEMPLATES = {
    path.stem: path.read_text() for path in (Path(__file__).parent / "templates").iterdir()
}
TOOLS = (
    Tool("get_weather", "Weather.", {"type": "object", "properties": {"city": {"type": "string"}}}),
    Tool("now"),
    Tool("any", "", {"type": "object"}),
)
Make = Callable[[str], ChatFormat]


def call(arguments: str = '{"city": "Rome"}', *ids: str, text: str = "") -> ChatMessage:
    calls = tuple(ToolCall(each, "get_weather", arguments) for each in ids or ("call_1",))
    return ChatMessage("assistant", text, tool_calls=calls)


def result(call_id: str | None = "call_1", text: str = "sunny") -> ChatMessage:
    return ChatMessage("tool", text, tool_call_id=call_id)


ASK = ChatMessage("user", "Weather?")
SAID = ChatMessage("assistant", "It is sunny.")
SYSTEM = ChatMessage("system", "Be brief.")
CALL_WITH_TEXT = call(text="I look.")
LATE = ChatMessage("system", "Be polite.")
ARGUMENTS = {
    "broken": '{"city": "Ro',
    "encoded twice": json.dumps('{"city": "Rome"}'),
    "empty": "",
    "null": "null",
    "text": '"Rome"',
    "list": '["Rome"]',
    "number": "7",
    "half a surrogate": '{"city": "\\ud800"}',
}
HISTORIES: dict[str, tuple[ChatMessage, ...]] = {
    **{f"{name} arguments": (ASK, call(text), result()) for name, text in ARGUMENTS.items()},
    "plain": (SYSTEM, ASK, SAID, ASK),
    "a call": (SYSTEM, ASK, call(), result(), SAID, ASK),
    "a call with text": (ASK, CALL_WITH_TEXT, result(), SAID, ASK),
    "several calls": (ASK, call("{}", "a", "b"), result("b", "rain"), result("a"), SAID, ASK),
    "no result": (ASK, call(), ASK),
    "no result yet": (ASK, call("{}", "a", "b"), result("a")),
    "no call": (ASK, result("gone"), ASK),
    "result first": (result("gone"), ASK),
    "late result": (ASK, call(), ASK, result()),
    "no ids": (ASK, call("{}", ""), result(None), ASK),
    "the same id twice": (ASK, call(), result(), call(), result(), ASK),
    "no user": (SYSTEM, SAID),
    "system alone": (SYSTEM,),
    "late system": (ASK, SAID, LATE, ASK),
    "last system": (ASK, LATE),
    "two systems": (SYSTEM, LATE, ASK),
    "assistant first": (SAID, ASK),
    "two in a row": (ASK, ASK, SAID, SAID, ASK),
    "empty answer": (ASK, ChatMessage("assistant", ""), ASK),
    "assistant last": (ASK, SAID),
}


@pytest.fixture(scope="module")
def chat() -> Iterator[Make]:
    made = {name: ChatFormat(text, "<s>", "</s>") for name, text in TEMPLATES.items()}
    pair = ChatFormat(TEMPLATES["default_only"], "", "", tool_template=TEMPLATES["tool_use"])
    yield {**made, "default_only and tool_use": pair}.__getitem__
    for form in (*made.values(), pair):
        form.close()


@pytest.mark.parametrize("tools", [(), TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES)
@pytest.mark.parametrize("name", [*TEMPLATES, "default_only and tool_use"])
def test_every_history_is_in_the_prompt(
    chat: Make, name: str, history: tuple[ChatMessage, ...], tools: tuple[Tool, ...]
) -> None:
    prompt = ChatPrompt(history, tools=tools)
    text = chat(name).for_prompt(prompt).render(prompt)
    if name == "mistral_like":
        # It writes no text beside calls, and a system message only with a user's.
        history = tuple(each for each in history if each not in (SYSTEM, CALL_WITH_TEXT))
    for message in history:
        assert message.content in text
        assert all(each.name in text for each in message.tool_calls)
    assert all(tool.name in text for tool in tools)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_history_that_grows_keeps_its_prompt(chat: Make, name: str) -> None:
    """The next turn begins with this one's prompt, so that its prefix is reused."""
    turns: tuple[ChatMessage, ...] = (SYSTEM, ASK, call(), result(), SAID, ASK)
    turns = (*turns, call("{}", "x", "y"))
    turns = (*turns, result("x"), result("y", "rain"), SAID, ASK)
    ends = [number for number, each in enumerate(turns, start=1) if each.role == "user"]
    form = chat(name)
    opening = "<|im_start|>assistant\n"
    texts = [form.render(ChatPrompt(turns[:end], tools=TOOLS)) for end in ends]
    for shorter, longer in pairwise(texts):
        assert longer.startswith(shorter.removesuffix(opening))


def test_a_refusal_has_the_words_of_the_template() -> None:
    form = ChatFormat("{{ raise_exception('no') }}" + TEMPLATES["mistral_like"], "", "")
    with pytest.raises(TemplateRefused, match=r"^no$") as caught:
        form.render(ChatPrompt((SYSTEM, ASK), tools=TOOLS))
    assert (caught.value.status, caught.value.code) == (400, "template_refused")
    form.close()
