"""Tests of prompts that are refused before they are tokenized."""

import pytest

from backends.echo import END_TOKEN, ByteTokenizer, echo_info
from backends.prompt.chat_format import ChatFormat
from backends.prompt.infill import InfillTokens
from backends.prompt.prepare import Preparer
from core.errors import ContextLengthExceeded, RequestError
from core.types import (
    ChatMessage,
    ChatPrompt,
    GenerationRequest,
    InfillPrompt,
    Prompt,
    TextPrompt,
)


class BoundingTokenizer(ByteTokenizer):
    """Knows a bound, and refuses to encode what is over it."""

    def fewest_tokens(self, text: str, limit: int) -> int:
        return len(text) if len(text) > limit else 0

    def encode(self, text: str, *, add_bos: bool, parse_special: bool) -> list[int]:
        assert len(text) <= 300_000
        return super().encode(text, add_bos=add_bos, parse_special=parse_special)


PREPARER = Preparer(echo_info(), BoundingTokenizer(), ChatFormat(None, "", ""), context_tokens=256)


@pytest.mark.parametrize(
    "prompt",
    [TextPrompt("a" * 8_000_000), ChatPrompt((ChatMessage("user", "a" * 8_000_000),))],
    ids=["text", "chat"],
)
def test_a_prompt_that_cannot_fit_is_refused_with_both_numbers(prompt: Prompt) -> None:
    with pytest.raises(ContextLengthExceeded, match=r"256 tokens.*at least 8000") as caught:
        PREPARER.prepare(GenerationRequest("r", "echo", prompt))
    assert caught.value.context_tokens == 256
    assert caught.value.prompt_tokens >= 8_000_000


def test_token_counts_go_beyond_the_context_but_have_a_limit() -> None:
    assert PREPARER.count(TextPrompt("a" * 10_000)) == 10_000
    with pytest.raises(ContextLengthExceeded, match="at least"):
        PREPARER.count(TextPrompt("a" * 8_000_000))


@pytest.mark.parametrize("prompt", [TextPrompt("a\ud800"), InfillPrompt("a\ud800", "")])
def test_an_unpaired_surrogate_is_the_requests_fault(prompt: Prompt) -> None:
    preparer = Preparer(
        echo_info(),
        ByteTokenizer(),
        ChatFormat(None, "", ""),
        context_tokens=256,
        infill=InfillTokens(1, 2, 3),
    )
    with pytest.raises(RequestError, match="surrogate"):
        preparer.prepare(GenerationRequest("r", "echo", prompt))


def chat_preparer(template: str) -> Preparer:
    return Preparer(
        echo_info(), BoundingTokenizer(), ChatFormat(template, "", ""), context_tokens=256
    )


def test_a_last_question_that_cannot_fit_is_not_rendered() -> None:
    preparer = chat_preparer("{{ raise_exception('it was rendered') }}")
    asked = (
        ChatMessage("user", "a" * 8_000_000),
        ChatMessage("assistant", "", reasoning="short"),
        ChatMessage("tool", "short", tool_call_id="1"),
    )
    for act in (
        lambda: preparer.prepare(GenerationRequest("r", "echo", ChatPrompt(asked))),
        lambda: preparer.count(ChatPrompt(asked)),
    ):
        with pytest.raises(ContextLengthExceeded, match="at least 8000"):
            act()
    preparer.close()


@pytest.mark.parametrize(
    "messages",
    [
        (ChatMessage("user", "a" * 9_000), ChatMessage("user", "b")),
        (ChatMessage("user", " " * 9_000 + "b"),),
        (ChatMessage("assistant", "a" * 9_000), ChatMessage("user", "b")),
    ],
    ids=["an earlier question", "blanks", "an earlier answer"],
)
def test_what_a_template_drops_need_not_fit(messages: tuple[ChatMessage, ...]) -> None:
    preparer = chat_preparer("{{ messages[-1].content | trim }}")
    prepared = preparer.prepare(GenerationRequest("r", "echo", ChatPrompt(messages)))
    assert bytes(prepared.prompt) == b"b"
    preparer.close()


class EndingTokenizer(ByteTokenizer):
    """Knows the tokens that end an answer."""

    end_ids = frozenset({END_TOKEN, 300})


def test_empty_prompt_begins_after_the_end_of_another_text() -> None:
    chat = ChatFormat(None, "", "")
    preparer = Preparer(echo_info(), EndingTokenizer(), chat, context_tokens=256)
    assert preparer.prepare(GenerationRequest("r", "echo", TextPrompt(""))).prompt == (END_TOKEN,)
    assert preparer.prepare(GenerationRequest("r", "echo", TextPrompt("a"))).prompt == (ord("a"),)
    unknown = Preparer(echo_info(), ByteTokenizer(), chat, context_tokens=256)
    with pytest.raises(RequestError, match="The prompt is empty"):
        unknown.prepare(GenerationRequest("r", "echo", TextPrompt("")))
