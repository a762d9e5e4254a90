"""Answers that continue a begun one: where the prompt ends, reasoning, and formats."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from backends.echo import ByteTokenizer, echo_info
from backends.grammar.constraint import Constraint
from backends.prompt.chat_format import ChatFormat
from backends.prompt.prepare import Preparer
from core.errors import RequestError, UnsupportedParameter
from core.types import (
    ChatMessage,
    ChatPrompt,
    GenerationRequest,
    JsonOutput,
    ReasoningDelta,
    TextDelta,
    Tool,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}<think>\n"
    "{{ m.reasoning_content or '' }}\n</think>\n{% endif %}{{ m.content.split('</think>')[-1] }}"
    "[end]{% endfor %}{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
)
HELLO = ChatMessage("user", "Hello")


@pytest.fixture
def chat() -> Iterator[Callable[[str | None], ChatFormat]]:
    made: list[ChatFormat] = []

    def make(template: str | None) -> ChatFormat:
        made.append(ChatFormat(template, "", ""))
        return made[-1]

    yield make
    for one in made:
        one.close()


def begun(content: str, reasoning: str | None = None, user: str = "Hello") -> ChatPrompt:
    messages = (ChatMessage("user", user), ChatMessage("assistant", content, reasoning=reasoning))
    return ChatPrompt(messages, continues_answer=True)


@pytest.mark.parametrize(
    "content", ["1, 2,", "x ", " x", "\n", "{{ a }}", "<|im_end|>", "grüße 🎈"]
)
def test_prompt_ends_with_the_begun_answer(
    chat: Callable[[str | None], ChatFormat], content: str
) -> None:
    head = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert chat(CHATML).render(begun(content)) == head + content
    assert chat(None).render(begun(content)) == f"User: Hello\nAssistant: {content}"


def test_mark_in_the_conversation_changes_nothing(
    chat: Callable[[str | None], ChatFormat],
) -> None:
    mark = "\u27e6the-begun-answer\u27e7"
    rendered = chat(CHATML).render(begun("so", user=mark))
    assert rendered.endswith(f"{mark}<|im_end|>\n<|im_start|>assistant\nso")
    rendered = chat(CHATML).render(begun(f"a {mark} b"))
    assert rendered.endswith(f"<|im_start|>assistant\na {mark} b")


@pytest.mark.parametrize(
    ("prompt", "end", "goes_on_in_reasoning"),
    [
        (begun("So"), "[assistant]<think>\n\n</think>\nSo", False),
        (begun("So", "I see."), "[assistant]<think>\nI see.\n</think>\nSo", False),
        (begun("", "I see"), "<think>\nI see", True),
        (begun("<think>\nI see"), "<think>\nI see", True),
        (begun("<think>\nI see</think>So"), "<think>\nI see</think>So", False),
    ],
)
def test_reasoning_goes_on_where_it_was_begun(
    chat: Callable[[str | None], ChatFormat],
    prompt: ChatPrompt,
    end: str,
    goes_on_in_reasoning: bool,
) -> None:
    form = chat(THINKING)
    rendered = form.render(prompt)
    assert rendered.endswith(end)
    parser = form.parser(prompt, rendered)
    assert parser is not None
    events = [*parser.push("more"), *parser.flush()]
    kinds = {type(event) for event in events}
    assert kinds == {ReasoningDelta if goes_on_in_reasoning else TextDelta}


def test_template_without_the_last_content_is_refused(
    chat: Callable[[str | None], ChatFormat],
) -> None:
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(UnsupportedParameter, match="cannot continue"):
        chat(template).render(begun("So"))


def test_begun_answer_is_no_bare_call() -> None:
    tool = Tool("weather", "", {"type": "object"})
    form = ChatFormat(None, "", "", tool_parser="llama3_json")
    fresh = ChatPrompt((HELLO,), tools=(tool,))
    assert form.bare_call(fresh) is not None
    prompt = ChatPrompt(begun("So").messages, tools=(tool,), continues_answer=True)
    assert form.bare_call(prompt) is None
    form.close()


class RecordingMask:
    """Accepts what starts with a brace, and records what it was started with."""

    is_active = True
    is_finished = False
    problem = ""
    begun = b""

    def apply(self, logits: NDArray[np.float32]) -> None:
        del logits

    def accept(self, token_id: int) -> None:
        del token_id

    def restart(self, data: bytes) -> bool:
        self.begun = data
        return data.startswith(b"{")


class MaskingTokenizer(ByteTokenizer):
    """Has a grammar for everything."""

    can_constrain = True

    def mask(self, constraint: Constraint) -> RecordingMask:
        del constraint
        return RecordingMask()


@pytest.mark.parametrize(
    ("content", "expected"),
    [('{"a": 1', b'{"a": 1'), ('<think>\nI see</think>\n{"a', b'{"a'), ("", b"")],
)
def test_format_includes_the_begun_answer(
    chat: Callable[[str | None], ChatFormat], content: str, expected: bytes
) -> None:
    form = chat(THINKING)
    ready = Preparer(echo_info(), MaskingTokenizer(), form, context_tokens=512)
    prompt = begun(content)
    mask = ready.prepare(GenerationRequest("1", "m", prompt, output=JsonOutput())).mask
    whole = getattr(mask, "_whole", mask)
    assert isinstance(whole, RecordingMask)
    assert whole.begun == expected
    with pytest.raises(RequestError, match="begun answer does not match"):
        ready.prepare(GenerationRequest("3", "m", begun("Sure: {"), output=JsonOutput()))


WEATHER = Tool("weather", "", {"type": "object"})


@pytest.mark.parametrize(
    ("family", "content", "is_inside"),
    [
        ("hermes", "<tool_call>", True),
        ("hermes", 'So. <tool_call>\n{"name": "wea', True),
        ("hermes", '<tool_call>\n{"name": "weather"}\n</tool_call>\nSo', False),
        ("hermes", "<think>\n<tool_call></think>So", False),
        ("hermes", '{"name": "weather", "arguments": {', True),
        ("hermes", '{"name": "other", "arg', False),
        ("hermes", '{"weather": "name"', False),
        ("hermes", '{"name": "weather"}', False),
        ("hermes", "So", False),
        ("mistral", "[TOOL_CALLS]weather", True),
        ("qwen3_coder", "<function=weather>", True),
    ],
)
def test_a_begun_call_is_refused(family: str, content: str, is_inside: bool) -> None:
    form = ChatFormat(THINKING, "", "", tool_parser=family)
    messages = begun(content).messages
    try:
        prompt = ChatPrompt(messages, tools=(WEATHER,), continues_answer=True)
        if is_inside:
            with pytest.raises(UnsupportedParameter, match="within a tool call") as caught:
                form.render(prompt)
            assert caught.value.param == "messages"
        else:
            assert form.render(prompt).endswith(content)
        # Without tools it is text.
        for other in (
            ChatPrompt(messages, continues_answer=True),
            ChatPrompt(messages, tools=(WEATHER,), tool_choice="none", continues_answer=True),
        ):
            assert form.render(other).endswith(content)
    finally:
        form.close()
