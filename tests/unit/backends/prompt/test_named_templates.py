"""A model's template for tools is used for conversations with tools, the default one for others."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backends.echo import ByteTokenizer, echo_info
from backends.hf.tokenizer import HfTokenizer
from backends.prompt.chat_format import ChatFormat
from backends.prompt.prepare import Preparer
from backends.stepper import StepOutput, Tokenizer
from core.errors import BrokenModel, TemplateRefused, UnsupportedParameter
from core.types import (
    ChatMessage,
    ChatPrompt,
    GenerationEvent,
    GenerationRequest,
    ReasoningDelta,
    TextDelta,
    TokenizeOptions,
    Tool,
    ToolCall,
)
from tests.unit.backends.hf.test_hf_tokenizer import tiny

DEFAULT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[THINK]{% endif %}"
)
# As the one of the Hermes models, it fails without a list of tools.
TOOL_USE = (
    "tools:{% for tool in tools %}{{ tool.function.name }};{% endfor %}{% for m in messages %}"
    "({{ m.role }}){{ m.content }}{% for c in m.tool_calls or [] %}[TOOL_CALLS]"
    "{{ c.function.name }}{% endfor %}{% endfor %}"
)
FAILS = "{{ {}.a.b }}{{ tools }}"
REFUSES = "{{ raise_exception('never with tools') }}{{ tools }}"
USER = ChatMessage("user", "hi")
CALL = ChatMessage("assistant", "", tool_calls=(ToolCall("1", "f", "{}"),))
RESULT = ChatMessage("tool", "r", tool_call_id="1")
TOOL = Tool("f", "", {"type": "object"})

Make = Callable[..., Preparer]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Preparer] = []

    def prepare(
        default: str | None, for_tools: str | None, tokenizer: Tokenizer, rag: str | None = None
    ) -> Preparer:
        chat = ChatFormat(default, "", "", tool_template=for_tools, rag_template=rag)
        info = replace(echo_info(), chat_template=default, tool_template=for_tools)
        made.append(Preparer(info, tokenizer, chat, context_tokens=4096))
        return made[-1]

    yield prepare
    for one in made:
        one.close()


def text_of(preparer: Preparer, prompt: ChatPrompt) -> str:
    """Return the prompt's text, the same whoever asks."""
    text = preparer.tokenize(prompt, TokenizeOptions()).text
    prepared = preparer.prepare(GenerationRequest("r", "m", prompt))
    assert bytes(prepared.prompt).decode() == text
    assert preparer.count(prompt) == len(prepared.prompt)
    return text


def answer(preparer: Preparer, prompt: ChatPrompt, text: str) -> list[GenerationEvent]:
    """Return the events of an answer, with neighbouring texts joined."""
    assembler = preparer.prepare(GenerationRequest("r", "m", prompt)).assembler
    events = [event for each in text.encode() for event in assembler.push(StepOutput(0, each))]
    joined: list[GenerationEvent] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, TextDelta | ReasoningDelta) and type(last) is type(event):
            joined[-1] = type(event)(f"{last.text}{event.text}")
        elif isinstance(event, TextDelta | ReasoningDelta):
            joined.append(event)
    return joined


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (ChatPrompt((USER,)), "[user]hi[THINK]"),
        (ChatPrompt((USER,), tools=(TOOL,)), "tools:f;(user)hi"),
        (ChatPrompt((USER,), tools=(TOOL,), tool_choice="none"), "[user]hi[THINK]"),
        (ChatPrompt((USER, CALL, RESULT)), "tools:(user)hi(assistant)[TOOL_CALLS]f(tool)r"),
        (ChatPrompt((USER, CALL)), "tools:(user)hi(assistant)[TOOL_CALLS]f"),
        (ChatPrompt((USER, RESULT)), "tools:(user)hi(tool)r"),
    ],
)
def test_the_template_for_tools_is_used_with_tools_and_calls(
    make: Make, prompt: ChatPrompt, expected: str
) -> None:
    assert text_of(make(DEFAULT, TOOL_USE, ByteTokenizer()), prompt) == expected


def test_a_model_with_a_template_for_tools_alone_answers_other_chats(make: Make) -> None:
    preparer = make(None, TOOL_USE, ByteTokenizer())
    assert text_of(preparer, ChatPrompt((USER,))) == "User: hi\nAssistant:"
    assert text_of(preparer, ChatPrompt((USER,), tools=(TOOL,))) == "tools:f;(user)hi"
    assert answer(preparer, ChatPrompt((USER,)), "a\nUser: b") == [TextDelta("a")]


@pytest.mark.parametrize("template", [FAILS, REFUSES, "{% broken", "{% for x in tools %}"])
def test_the_default_template_is_used_where_the_one_for_tools_fails(
    make: Make, template: str
) -> None:
    text = text_of(make(DEFAULT, template, ByteTokenizer()), ChatPrompt((USER,), tools=(TOOL,)))
    assert text.startswith("[system]You can call functions.")
    assert text.endswith("[user]hi[THINK]")


def test_a_refusal_of_both_templates_has_the_words_of_the_first(make: Make) -> None:
    preparer = make("{{ raise_exception('never') }}", REFUSES, ByteTokenizer())
    with pytest.raises(TemplateRefused, match=r"^never with tools$"):
        preparer.count(ChatPrompt((USER,), tools=(TOOL,)))
    with pytest.raises(TemplateRefused, match=r"^never$"):
        preparer.count(ChatPrompt((USER,)))
    with pytest.raises(BrokenModel, match="has no attribute"):
        make(FAILS, FAILS, ByteTokenizer()).count(ChatPrompt((USER,), tools=(TOOL,)))


def test_answers_are_read_as_the_used_template_writes_them(make: Make) -> None:
    """The default reasons and calls as Hermes, the one for tools does neither."""
    preparer = make(DEFAULT, TOOL_USE, ByteTokenizer())
    (event,) = answer(preparer, ChatPrompt((USER,)), "so")
    assert event == ReasoningDelta("so")
    (event,) = answer(preparer, ChatPrompt((USER,), tools=(TOOL,)), "so")
    assert event == TextDelta("so")
    chat = ChatFormat(DEFAULT, "", "", tool_template=TOOL_USE)
    assert chat.family.name == "hermes"
    choices: list[Any] = ["auto", "required", ("function", "f")]
    for choice in choices:
        chosen = chat.for_prompt(ChatPrompt((USER,), tools=(TOOL,), tool_choice=choice))
        assert chosen.family.name == "mistral_json"
    assert {b"[THINK]", b"[TOOL_CALLS]"} <= {text for each in chat.formats for text in each.markers}
    chat.close()


def test_control_names_are_those_of_the_used_template(tmp_path: Path, make: Make) -> None:
    tiny(special=(), plain=("<table>",)).save(str(tmp_path / "tokenizer.json"))
    tokenizer = HfTokenizer(tmp_path)
    table = tokenizer.special_id("<table>")
    default = "{% for m in messages %}{{ m.content }}{% endfor %}"
    preparer = make(default, "<table>{{ tools }}" + default, tokenizer)
    asked = (ChatMessage("user", "a <table> b"),)
    found = [
        preparer.tokenize(ChatPrompt(asked, tools=tools), TokenizeOptions()).token_ids.count(table)
        for tools in ((), (TOOL,))
    ]
    # Without tools nothing but the message has the name, which is an ordinary token then.
    assert found == [1, 1]
    shown = preparer.tokenize(ChatPrompt(asked, tools=(TOOL,)), TokenizeOptions())
    assert shown.token_ids[0] == table
    assert "a <table> b" in shown.text


def test_what_the_template_for_tools_makes_impossible_is_named(tmp_path: Path, make: Make) -> None:
    ascii_only = (
        "{% for c in messages[0].content %}{% if c.isascii() %}{{ c }}{% else %}"
        "{{ raise_exception('only ASCII') }}{% endif %}{% endfor %}{% set _ = tools %}"
    )
    tiny(special=("<|im_end|>",), plain=()).save(str(tmp_path / "tokenizer.json"))
    tokenizer = HfTokenizer(tmp_path)
    assert make("{{ messages[0].content }}", None, tokenizer).limitations() == ()
    for templates in (("{{ messages[0].content }}", ascii_only), (ascii_only, ascii_only)):
        (sentence,) = make(*templates, tokenizer).limitations()
        assert "control tokens" in sentence


RAG = (
    "docs:{% for d in documents %}{% for key, value in d.items() %}{{ key }}={{ value }};"
    "{% endfor %}{% endfor %}{% for m in messages %}({{ m.role }}){{ m.content }}{% endfor %}"
)
BOTH = "{{ tools | length }}" + RAG
DOCUMENTS = ({"title": "T", "text": "x"}, {"text": "y"})
ASKED = ChatPrompt((USER,), documents=DOCUMENTS)
WITH_TOOLS = replace(ASKED, tools=(TOOL,))
READ = "docs:title=T;text=x;text=y;(user)hi"


@pytest.mark.parametrize(
    ("default", "for_tools", "rag", "prompt", "expected"),
    [
        (DEFAULT, TOOL_USE, RAG, ASKED, READ),
        (DEFAULT, TOOL_USE, RAG, ChatPrompt((USER,)), "[user]hi[THINK]"),
        (DEFAULT, TOOL_USE, RAG, ChatPrompt((USER,), tools=(TOOL,)), "tools:f;(user)hi"),
        (RAG, None, None, ASKED, READ),
        (DEFAULT, BOTH, None, WITH_TOOLS, f"1{READ}"),
        (DEFAULT, BOTH, RAG, WITH_TOOLS, f"1{READ}"),
        (BOTH, TOOL_USE, RAG, WITH_TOOLS, f"1{READ}"),
        (BOTH, TOOL_USE, None, WITH_TOOLS, f"1{READ}"),
        (None, None, RAG, ASKED, READ),
    ],
)
def test_documents_are_given_to_a_template_that_reads_them(
    make: Make,
    default: str | None,
    for_tools: str | None,
    rag: str | None,
    prompt: ChatPrompt,
    expected: str,
) -> None:
    assert text_of(make(default, for_tools, ByteTokenizer(), rag), prompt) == expected


def test_tools_beside_documents_are_written_into_the_messages(make: Make) -> None:
    text = text_of(make(DEFAULT, TOOL_USE, ByteTokenizer(), RAG), WITH_TOOLS)
    assert text.startswith("docs:title=T;text=x;text=y;(system)You can call functions.")


@pytest.mark.parametrize(
    ("default", "for_tools", "rag"),
    [
        (DEFAULT, None, None),
        (None, None, None),
        ("{# documents #}" + DEFAULT, TOOL_USE, "{# documents #}"),
    ],
)
def test_documents_that_no_template_reads_are_refused(
    make: Make, default: str | None, for_tools: str | None, rag: str | None
) -> None:
    preparer = make(default, for_tools, ByteTokenizer(), rag)
    with pytest.raises(UnsupportedParameter, match="read none") as caught:
        preparer.count(ASKED)
    assert caught.value.param == "documents"


def test_documents_are_never_dropped_where_their_template_fails(make: Make) -> None:
    preparer = make(DEFAULT, None, ByteTokenizer(), "{{ raise_exception('no') }}{{ documents }}")
    with pytest.raises(TemplateRefused, match=r"^no$"):
        preparer.count(ASKED)
    fallback = make(RAG, None, ByteTokenizer(), "{{ raise_exception('no') }}{{ documents }}")
    assert text_of(fallback, ASKED) == READ


def test_names_of_control_tokens_in_documents_are_text(make: Make, tmp_path: Path) -> None:
    tiny(special=("<|end|>", "<|a|>")).save(str(tmp_path / "tokenizer.json"))
    tokenizer = HfTokenizer(tmp_path)
    preparer = make(DEFAULT, None, tokenizer, RAG + "<|end|>")
    named = ChatPrompt((USER,), documents=({"text": "a <|end|>", "<|a|>": "b"},))
    end, other = tokenizer.special_id("<|end|>"), tokenizer.special_id("<|a|>")
    ids = preparer.prepare(GenerationRequest("r", "m", named)).prompt
    assert (ids.count(end), ids.count(other)) == (1, 0)
    assert "text=a <|end|>;<|a|>=b;" in preparer.tokenize(named, TokenizeOptions()).text
