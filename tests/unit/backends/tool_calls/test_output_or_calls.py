"""Tests of answers that match a format or call a tool, in every family."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.grammar.constraint import TokenMask
from backends.hf.tokenizer import HfTokenizer
from backends.prompt.chat_format import ChatFormat
from backends.tool_calls.families import FAMILIES
from backends.tool_calls.schemas import argument_checker
from core.errors import RequestError
from core.types import (
    ChatMessage,
    ChatPrompt,
    ChoiceOutput,
    JsonOutput,
    Output,
    RegexOutput,
    TextDelta,
    Tool,
    ToolCallDelta,
)
from tests.tool_forms import TEMPLATES, TOOLS, Answer, written

END = "<|end_of_text|>"
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Bern", "Rome"]}, "count": {"type": "integer", "maximum": 9}},
    "required": ["city", "count"],
    "additionalProperties": False,
}
ANSWER = '{"city": "Bern", "count": 3}'


@pytest.fixture(params=["text", "control"], scope="module")
def vocabulary(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a factory of vocabularies of bytes, with a family's markers as control tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    def make(family: str) -> HfTokenizer:
        marks = [mark for mark in FAMILIES[family].markers if mark[-1] in ">]"]
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        special = [END, *(marks if request.param == "control" else [])]
        made.add_special_tokens([AddedToken(text, special=True) for text in special])
        folder: Path = tmp_path_factory.mktemp("vocabulary")
        made.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
        read = HfTokenizer(folder)
        read.show(*(text.encode() for text in special))
        return read

    return make


def form_of(family: str) -> ChatFormat:
    return ChatFormat(TEMPLATES[family], "", "", tool_parser=family)


def asked(**options: Any) -> ChatPrompt:
    return ChatPrompt((ChatMessage("user", "hi"),), tools=tuple(TOOLS), **options)


def mask_of(
    family: str, read: HfTokenizer, prompt: ChatPrompt, output: Output | None = None
) -> TokenMask:
    constraint = form_of(family).constraint(prompt, output or JsonOutput(CITY), "")
    assert constraint is not None
    return read.mask(constraint)


def allowed(mask: TokenMask, read: HfTokenizer) -> list[int]:
    logits = np.zeros(read.vocabulary_size, np.float32)
    mask.apply(logits)
    return [int(i) for i in np.flatnonzero(np.isfinite(logits))]


def is_allowed(mask: TokenMask, read: HfTokenizer, text: str) -> bool:
    """Return whether the mask allows `text`, and then the end."""
    for token_id in [
        *read.encode(text, add_bos=False, parse_special=True),
        *list(read.end_ids)[:1],
    ]:
        if token_id not in allowed(mask, read):
            return False
        mask.accept(token_id)
    return True


def parsed(family: str, prompt: ChatPrompt, text: str) -> tuple[str, list[tuple[str, str]]]:
    """Return the answer's text and its calls."""
    parser = form_of(family).parser(prompt, "")
    assert parser is not None
    said, calls = "", []
    for piece in [*parser.push(text), *parser.flush()]:
        if isinstance(piece, TextDelta):
            said += piece.text
        elif isinstance(piece, ToolCallDelta):
            if piece.name is not None:
                calls.append([piece.name, ""])
            calls[-1][1] += piece.arguments
    return said, [(name, arguments) for name, arguments in calls]


def as_written(family: str, *calls: tuple[str, dict[str, Any]]) -> str:
    text = written(family, Answer(list(calls))).strip("\n")
    return text.removeprefix("<|start|>assistant").removesuffix("<|call|>")


FINAL = {"harmony": "<|channel|>final<|message|>"}
EDIT = ("edit_file", {"path": 'ä"b', "count": 3})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answer_may_be_the_format_or_a_call(family: str, vocabulary: Any) -> None:
    read, prompt = vocabulary(family), asked()
    answer = FINAL.get(family, "") + ANSWER
    assert is_allowed(mask_of(family, read, prompt), read, answer)
    assert parsed(family, prompt, answer) == (ANSWER, [])
    call = as_written(family, EDIT)
    assert is_allowed(mask_of(family, read, prompt), read, call), call
    said, calls = parsed(family, prompt, call)
    assert said == ""
    assert [(name, json.loads(text)) for name, text in calls] == [EDIT]


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_else_may_be_written(family: str, vocabulary: Any) -> None:
    read, prompt = vocabulary(family), asked()
    for text in ("I look.", '{"city": "Oslo", "count": 3}', "[1]", "call: gone()"):
        assert not is_allowed(mask_of(family, read, prompt), read, FINAL.get(family, "") + text)


@pytest.mark.parametrize("family", FAMILIES)
def test_whatever_the_mask_allows_is_the_format_or_valid_calls(
    family: str, vocabulary: Any
) -> None:
    pick = Tool("pick", "", CITY)
    read, prompt = vocabulary(family), ChatPrompt((ChatMessage("user", "hi"),), tools=(pick,))
    kinds = set()
    for seed in range(30):
        mask, chance, data = mask_of(family, read, prompt), random.Random(seed), b""
        for _ in range(8000):
            choices = allowed(mask, read)
            if any(read.is_end(i) for i in choices):
                break
            token_id = chance.choice(choices)
            data += read.token_bytes(token_id)
            mask.accept(token_id)
        said, calls = parsed(family, prompt, data.decode())
        if calls:
            assert all(argument_checker((pick,))(*call) for call in calls), data
            assert not said.strip(), data
        else:
            assert argument_checker((pick,))("pick", said), data
        kinds.add(bool(calls))
    assert kinds == {False, True}


SEVERAL = ("hermes", "qwen3_coder", "mistral", "kimi_k2", "deepseek_v3", "granite", "pythonic")


@pytest.mark.parametrize("family", SEVERAL)
def test_several_calls_are_allowed_unless_the_request_forbids_it(
    family: str, vocabulary: Any
) -> None:
    read = vocabulary(family)
    calls = as_written(family, EDIT, EDIT)
    assert is_allowed(mask_of(family, read, asked()), read, calls), calls
    if family == "hermes":
        assert not is_allowed(mask_of(family, read, asked(parallel_tool_calls=False)), read, calls)


@pytest.mark.parametrize(
    ("output", "text"),
    [
        (JsonOutput(), '{"a": [1]}'),
        (RegexOutput("[a-c]+", "guided_regex"), "abc"),
        (ChoiceOutput(("yes", "no"), "guided_choice"), "no"),
    ],
    ids=["json_object", "regex", "choice"],
)
@pytest.mark.parametrize("family", ["hermes", "llama3_json", "pythonic", "harmony"])
def test_every_kind_of_format_leaves_a_call_possible(
    family: str, output: Output, text: str, vocabulary: Any
) -> None:
    read = vocabulary(family)
    assert is_allowed(mask_of(family, read, asked(), output), read, FINAL.get(family, "") + text)
    assert is_allowed(mask_of(family, read, asked(), output), read, as_written(family, EDIT))


@pytest.mark.parametrize("choice", ["required", ("function", "edit_file")])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_forced_call_wins_over_the_format(family: str, choice: Any) -> None:
    form, prompt = form_of(family), asked(tool_choice=choice)
    assert form.constraint(prompt, JsonOutput(CITY), "") == form.constraint(prompt, None, "")


@pytest.mark.parametrize("family", FAMILIES)
def test_tools_that_may_not_be_called_change_nothing(family: str) -> None:
    form = form_of(family)
    without = ChatPrompt((ChatMessage("user", "hi"),))
    expected = form.constraint(without, JsonOutput(CITY), "")
    assert form.constraint(asked(tool_choice="none"), JsonOutput(CITY), "") == expected


def test_a_format_that_cannot_be_enforced_is_refused_beside_tools(vocabulary: Any) -> None:
    read = vocabulary("hermes")
    with pytest.raises(RequestError) as caught:
        mask_of("hermes", read, asked(), JsonOutput({"not": {"type": "string"}}))
    assert caught.value.param == "response_format"
