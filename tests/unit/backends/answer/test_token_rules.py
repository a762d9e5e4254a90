"""`ignore_eos`, `min_tokens`, `stop_token_ids` and `bad_words`: masks, and answers of an engine."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from backends.answer.token_rules import BannedTexts, RuleMask, VocabularyTexts
from backends.base import EngineOptions
from backends.echo import END_TOKEN, ByteTokenizer, EchoStepper, echo_info
from backends.engine.batching import BatchingEngine
from backends.engine.row_model import RowInput
from backends.engine.row_stepper import RowStepper
from backends.prompt.chat_format import ChatFormat
from backends.prompt.prepare import Preparer
from core.errors import RequestError, RequestFailed, UnsupportedParameter
from core.types import TokenRules
from tests.requests import end_of, request, run, text_of, token_ids_of

PROMPT = "ask"
ANSWER = "red green blue"


class EndingTokenizer(ByteTokenizer):
    """Bytes, and one token that ends an answer."""

    end_ids = frozenset({END_TOKEN})

    def is_end(self, token_id: int) -> bool:
        return token_id in self.end_ids

    def piece(self, token_id: int, *, special: bool) -> bytes:
        del special
        return self.token_bytes(token_id)


class ScriptedRows:
    """Finds the next byte of `ANSWER` likeliest, then the end, and next to each of them `z`."""

    max_rows = 4
    vocabulary_size = END_TOKEN + 1
    native_cpu_s = 0.0

    def __init__(self) -> None:
        self._rows: dict[int, list[int]] = {}
        self._next = 0

    def open_row(self, capacity: int) -> int:
        del capacity
        self._next += 1
        self._rows[self._next] = []
        return self._next

    def extend(self, rows: Sequence[RowInput]) -> NDArray[np.float32]:
        logits = np.zeros((len(rows), self.vocabulary_size), np.float32)
        script = [*ANSWER.encode(), END_TOKEN]
        for index, row in enumerate(rows):
            history = self._rows[row.row]
            history.extend(row.tokens)
            place = min(len(history) - len(PROMPT), len(script) - 1)
            logits[index, ord("z")] = 1.0
            logits[index, script[place]] = 2.0
        return logits

    def truncate(self, row: int, length: int) -> bool:
        del self._rows[row][length:]
        return True

    def copy_row(self, source: int, length: int, capacity: int) -> int | None:
        row = self.open_row(capacity)
        self._rows[row] = self._rows[source][:length]
        return row

    def close_row(self, row: int) -> None:
        del self._rows[row]

    def close(self) -> None:
        self._rows.clear()


@pytest.fixture
async def engine() -> AsyncIterator[BatchingEngine]:
    tokenizer = EndingTokenizer()
    options = EngineOptions(
        max_sequences=4, prefill_chunk_tokens=64, kv_tokens=1024, context_tokens=256
    )
    preparer = Preparer(echo_info(), tokenizer, ChatFormat(None, "", ""), context_tokens=256)
    opened = BatchingEngine(
        echo_info(),
        preparer,
        lambda: RowStepper(ScriptedRows(), tokenizer, options),
        max_waiting=8,
    )
    yield opened
    await opened.close()


async def answer(engine: BatchingEngine, rules: TokenRules | None, **options: object) -> str:
    events = await run(engine, request(PROMPT, rules=rules, **options))  # type: ignore[arg-type]
    return text_of(events)


async def test_without_rules_nothing_is_masked(engine: BatchingEngine) -> None:
    assert await answer(engine, None) == ANSWER
    assert await answer(engine, TokenRules()) == ANSWER


async def test_ignored_end_lets_the_answer_go_on_to_its_limit(engine: BatchingEngine) -> None:
    events = await run(engine, request(PROMPT, rules=TokenRules(ignore_eos=True), max_tokens=20))
    assert text_of(events) == ANSWER + "z" * (20 - len(ANSWER))
    assert end_of(events).reason == "length"
    assert end_of(events).usage.completion_tokens == 20


async def test_ignored_end_leaves_stop_strings(engine: BatchingEngine) -> None:
    assert await answer(engine, TokenRules(ignore_eos=True), stop=["zz"]) == ANSWER


@pytest.mark.parametrize("least", [1, len(ANSWER), len(ANSWER) + 1, len(ANSWER) + 5])
async def test_answer_has_at_least_the_tokens(engine: BatchingEngine, least: int) -> None:
    events = await run(engine, request(PROMPT, rules=TokenRules(min_tokens=least), max_tokens=40))
    assert text_of(events) == ANSWER + "z" * max(least - len(ANSWER), 0)
    assert end_of(events).reason == "stop"


async def test_stop_string_counts_only_after_the_least_tokens(engine: BatchingEngine) -> None:
    assert await answer(engine, None, stop=["re"]) == ""
    assert await answer(engine, TokenRules(min_tokens=3), stop=["re"]) == "red g"
    assert await answer(engine, TokenRules(min_tokens=7), stop=["re"]) == ANSWER


@pytest.mark.parametrize("ignore_eos", [False, True])
async def test_stop_token_ends_the_answer_and_is_no_text(
    engine: BatchingEngine, ignore_eos: bool
) -> None:
    rules = TokenRules(stop_token_ids=(ord("g"), ord("b")), ignore_eos=ignore_eos)
    events = await run(engine, request(PROMPT, rules=rules, top_logprobs=0))
    assert text_of(events) == "red "
    assert token_ids_of(events) == list(b"red g")
    assert end_of(events).reason == "stop"


async def test_stop_token_does_not_come_before_the_least_tokens(engine: BatchingEngine) -> None:
    rules = TokenRules(stop_token_ids=(ord("g"), ord("b")), min_tokens=6)
    assert await answer(engine, rules) == "red zreen "


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("green",), "red greez blue"),
        (("e",), "rzd grzzn bluz"),
        (("d g", "blu"), "red zreen blze"),
        (("absent",), ANSWER),
        (("ed green bl",), "red green bzue"),
        # All other bytes are equally likely; the lowest one is chosen.
        (("red", "rez"), "re\0 green blue"),
    ],
)
async def test_banned_text_is_not_written_token_by_token(
    engine: BatchingEngine, words: tuple[str, ...], text: str
) -> None:
    found = await answer(engine, TokenRules(bad_words=words))
    assert not any(word in found for word in words)
    assert found == text


async def test_rules_of_one_request_leave_its_neighbour_alone(engine: BatchingEngine) -> None:
    found = await asyncio.gather(
        answer(engine, TokenRules(bad_words=("green",))),
        answer(engine, None),
        answer(engine, TokenRules(min_tokens=16)),
    )
    assert list(found) == ["red greez blue", ANSWER, ANSWER + "zz"]


async def test_resumed_answer_counts_and_reads_the_tokens_before(engine: BatchingEngine) -> None:
    rules = TokenRules(min_tokens=16, bad_words=("green",))
    whole = request(PROMPT, rules=rules)
    expected = text_of(await run(engine, whole))
    for cut in range(1, len(expected)):
        begun = expected[:cut].encode()
        events = await run(engine, replace(whole, generated=tuple(begun)))
        assert text_of(events) == expected[cut:]


@pytest.mark.parametrize("token_id", [END_TOKEN + 1, 2**31 - 1])
async def test_stop_token_outside_the_vocabulary_is_refused(
    engine: BatchingEngine, token_id: int
) -> None:
    with pytest.raises(RequestError) as caught:
        await answer(engine, TokenRules(stop_token_ids=(token_id,)))
    assert caught.value.param == "stop_token_ids"


async def test_answer_of_nothing_but_banned_texts_fails(engine: BatchingEngine) -> None:
    rules = TokenRules(bad_words=tuple(map(chr, range(128))))
    others = dict.fromkeys(range(128, 257), -100.0)
    with pytest.raises(RequestFailed, match="bad_words"):
        await run(engine, request(PROMPT, rules=rules, logit_bias=others))


@pytest.mark.parametrize(
    "rules",
    [TokenRules(ignore_eos=True), TokenRules(min_tokens=1), TokenRules(bad_words=("x",))],
)
async def test_model_whose_tokens_cannot_be_excluded_refuses(rules: TokenRules) -> None:
    preparer = Preparer(echo_info(), ByteTokenizer(), ChatFormat(None, "", ""), context_tokens=99)
    echo = BatchingEngine(echo_info(), preparer, lambda: EchoStepper(2), max_waiting=8)
    with pytest.raises(UnsupportedParameter) as caught:
        await run(echo, request("hi", rules=rules))
    assert getattr(rules, caught.value.param or "")
    stops = TokenRules(stop_token_ids=(ord("i"),))
    assert text_of(await run(echo, request("hi", rules=stops))) == "h"
    await echo.close()


class OneToken:
    """A format's mask that allows one token after the other, then only the end."""

    problem = ""
    is_active = True

    def __init__(self, *allowed: int) -> None:
        self._allowed = [*allowed]

    def apply(self, logits: NDArray[np.float32]) -> None:
        allowed = self._allowed[0] if self._allowed else END_TOKEN
        logits[np.arange(len(logits)) != allowed] = -np.inf

    def accept(self, token_id: int) -> None:
        assert token_id == self._allowed.pop(0)


def rule_mask(rules: TokenRules, inner: OneToken | None = None) -> RuleMask:
    return RuleMask(
        rules, inner, end_ids={END_TOKEN}, texts=None, token_bytes=ByteTokenizer().token_bytes
    )


def allowed(mask: RuleMask, size: int = END_TOKEN + 1) -> set[int]:
    logits = np.zeros(size, np.float32)
    mask.apply(logits)
    return {index for index, value in enumerate(logits) if value == 0.0}


@pytest.mark.parametrize("rules", [TokenRules(ignore_eos=True), TokenRules(min_tokens=9)])
def test_complete_format_ends_in_spite_of_the_rules(rules: TokenRules) -> None:
    mask = rule_mask(rules, OneToken(5, 6))
    for token_id in (5, 6):
        assert allowed(mask) == {token_id}
        mask.accept(token_id)
    assert allowed(mask) == {END_TOKEN}


def test_mask_is_inactive_once_it_excludes_nothing() -> None:
    mask = rule_mask(TokenRules(min_tokens=2))
    assert mask.is_active
    mask.accept(1)
    mask.accept(2)
    assert not mask.is_active
    assert not rule_mask(TokenRules(stop_token_ids=(3,))).is_active
    assert rule_mask(TokenRules(ignore_eos=True)).is_active


def test_end_beyond_the_logits_is_no_error() -> None:
    assert allowed(rule_mask(TokenRules(ignore_eos=True)), size=100) == set(range(100))


PIECES = ["", "a", "b", "ab", "ba", "aab", "ä", "\u00ff", "bä", "abab", "b a", " "]


@settings(max_examples=300, deadline=None)
@given(
    words=st.lists(st.text("abä\u00ff ", min_size=1, max_size=5), min_size=1, max_size=4),
    choices=st.lists(st.integers(0, len(PIECES) - 1), max_size=12),
)
def test_exactly_the_tokens_that_complete_a_text_are_banned(
    words: list[str], choices: list[int]
) -> None:
    texts = [piece.encode() for piece in PIECES] + [b"\xc3", b"\xa4", b"\xbf", b"\xff"]
    mask = BannedTexts(words, VocabularyTexts(texts.__getitem__, len(texts)))
    written = b""
    for choice in choices:
        logits = np.zeros(len(texts), np.float32)
        mask.ban(logits)
        for index, text in enumerate(texts):
            completes = any(word.encode() in written + text for word in words) and bool(text)
            assert (logits[index] == -np.inf) == completes, (written, text)
        if logits[choice] == 0.0:
            written += texts[choice]
            mask.accept(texts[choice])


def test_many_long_texts_are_banned_at_their_last_byte() -> None:
    words = ["a" * 63 + chr(0x4E00 + index) for index in range(64)]
    mask = BannedTexts(words, VocabularyTexts(ByteTokenizer().token_bytes, END_TOKEN + 1))
    for byte in b"aaaa" + words[0].encode()[:-1]:
        logits = np.zeros(END_TOKEN + 1, np.float32)
        mask.ban(logits)
        assert np.isfinite(logits).all()
        mask.accept(bytes((byte,)))
    mask.ban(logits)
    assert set(np.flatnonzero(logits == -np.inf)) == {word.encode()[-1] for word in words}
