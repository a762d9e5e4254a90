"""Tests of grammars for forced, triggered and bare tool calls in every family."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.answer.mask import AnswerMask, ReasoningPlan
from backends.answer.reasoning import HARMONY, THINK
from backends.grammar.constraint import TokenMask
from backends.hf.tokenizer import HfTokenizer
from backends.prompt.chat_format import ChatFormat
from backends.tool_calls.bare_call_grammar import bare_call_grammar
from backends.tool_calls.families import FAMILIES
from backends.tool_calls.grammar import call_constraint, triggered_calls
from backends.tool_calls.schemas import argument_checker
from core.errors import RequestError
from core.types import ChatMessage, ChatPrompt, ChoiceOutput, Tool, ToolCallDelta
from tests.tool_forms import TOOLS, Answer, written

END = "<|end_of_text|>"
PICK = Tool(
    "pick",
    "",
    {
        "type": "object",
        "properties": {
            "color": {"type": "string", "enum": ["red", "blue"]},
            "count": {"type": "integer", "minimum": 0, "maximum": 99},
            "is_last": {"type": "boolean"},
            "note": {"type": "string", "enum": ["a b", "c"]},
        },
        "required": ["color", "count"],
        "additionalProperties": False,
    },
)
EMPTY = Tool("stop_all", "", {"type": "object", "properties": {}, "additionalProperties": False})


def tokenizer(folder: Path, *, special: tuple[str, ...]) -> HfTokenizer:
    """Return a vocabulary of bytes, a few longer tokens and these control tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(['{"name": "pick", "arguments": {"color": "red"}}', "think"], trainer)
    made.add_special_tokens([AddedToken(text, special=True) for text in special])
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    read = HfTokenizer(folder)
    read.show(*(text.encode() for text in special))
    return read


@pytest.fixture(params=["text", "control"], scope="module")
def vocabulary(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a factory: a family's markers are plain text in one and control tokens in another."""
    made: dict[str, HfTokenizer] = {}

    def make(family: str) -> HfTokenizer:
        if family not in made:
            marks = (*FAMILIES[family].markers, "<think>", "</think>")
            special = marks if request.param == "control" else ()
            special = tuple(mark for mark in special if mark[-1] in ">]")
            made[family] = tokenizer(tmp_path_factory.mktemp(family), special=special)
        return made[family]

    return make


def allowed(mask: TokenMask, read: HfTokenizer) -> list[int]:
    logits = np.zeros(read.vocabulary_size, np.float32)
    if mask.is_active:
        mask.apply(logits)
    return [int(i) for i in np.flatnonzero(np.isfinite(logits))]


def go_on(mask: TokenMask, read: HfTokenizer, chance: random.Random, steps: int) -> tuple[str, int]:
    """Return what is said until an end that comes after `steps` tokens, and the ends before it."""
    text, passed = b"", 0
    for step in range(3000):
        choices = allowed(mask, read)
        others = [i for i in choices if not read.is_end(i)]
        if len(others) < len(choices):
            if step >= steps or not others:
                return text.decode(), passed
            passed += 1
        token_id = chance.choice(others)
        text += read.token_bytes(token_id)
        mask.accept(token_id)
    raise AssertionError(f"no end in {text[:500]!r}")


def walk(mask: TokenMask, read: HfTokenizer, seed: int) -> str:
    """Return what a model that knows nothing but the mask says up to the first end."""
    return go_on(mask, read, random.Random(seed), steps=0)[0]


def calls_in(family: str, text: str, tools: tuple[Tool, ...]) -> list[tuple[str, str]]:
    parser = FAMILIES[family].parser(tools)
    calls: list[tuple[str, str]] = []
    for piece in parser.push(text) + parser.flush():
        if isinstance(piece, ToolCallDelta):
            if piece.name is not None:
                calls.append((piece.name, ""))
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.arguments)
    return calls


@pytest.mark.parametrize("is_bare", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_forced_call_is_one_valid_call(family: str, is_bare: bool, vocabulary: Any) -> None:
    if is_bare and family not in ("llama3_json", "pythonic"):
        is_bare = False
    read = vocabulary(family)
    tools = (PICK, EMPTY)
    constraint = call_constraint(FAMILIES[family], tools, is_bare=is_bare)
    for seed in range(6):
        text = walk(read.mask(constraint), read, seed)
        ((name, arguments),) = calls_in(family, text, tools)
        assert argument_checker(tools)(name, arguments), text


ONE_CALL_FORMS = {"harmony", "llama3_json"}


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_that_must_come_may_be_several(family: str, vocabulary: Any) -> None:
    read, tools = vocabulary(family), (PICK, EMPTY)
    constraint = call_constraint(FAMILIES[family], tools, allows_several=True)
    most = 0
    for seed in range(6):
        text, passed = go_on(read.mask(constraint), read, random.Random(seed), steps=300)
        calls = calls_in(family, text, tools)
        assert all(argument_checker(tools)(*call) for call in calls), text
        assert len(calls) >= 1 + passed
        most = max(most, len(calls))
    assert (most == 1) == (family in ONE_CALL_FORMS)


def test_bare_calls_that_must_come_may_be_several_in_a_list(vocabulary: Any) -> None:
    read, tools = vocabulary("pythonic"), (PICK, EMPTY)
    constraint = call_constraint(FAMILIES["pythonic"], tools, is_bare=True, allows_several=True)
    texts = [
        go_on(read.mask(constraint), read, random.Random(seed), steps=300)[0] for seed in range(6)
    ]
    assert max(len(calls_in("pythonic", text, tools)) for text in texts) > 1


def test_a_bounded_answer_of_harmony_is_in_its_final_channel(vocabulary: Any) -> None:
    read = vocabulary("harmony")
    form = ChatFormat("{{ tools }}<|channel|>analysis<|message|>", "", "")
    prompt = ChatPrompt((ChatMessage("user", "hi"),))
    constraint = form.constraint(prompt, ChoiceOutput(("yes", "no"), "guided_choice"), "")
    assert constraint is not None
    text = walk(read.mask(constraint), read, seed=1)
    parser = form.parser(prompt, "")
    assert parser is not None
    pieces = [*parser.push(text), *parser.flush()]
    assert "".join(getattr(piece, "text", "") for piece in pieces) in ("yes", "no")


def begun(family: str, read: HfTokenizer, tools: tuple[Tool, ...]) -> AnswerMask:
    triggered = [
        (start, read.mask(one)) for start, one in triggered_calls(FAMILIES[family], tools).items()
    ]
    return AnswerMask(read, triggered=triggered)


MARKED = [name for name, family in FAMILIES.items() if not family.is_start_ambiguous]


@pytest.mark.parametrize("family", MARKED)
def test_a_begun_call_is_valid_and_the_rest_is_free(family: str, vocabulary: Any) -> None:
    read = vocabulary(family)
    start = FAMILIES[family].tool_call_start
    if family == "harmony":
        start = "<|channel|>commentary to=functions."
    for seed in range(6):
        mask = begun(family, read, (PICK,))
        text = "I look: "
        for token_id in read.encode(f"I look: {start}", add_bos=False, parse_special=True):
            assert not mask.is_active
            mask.accept(token_id)
        text += start
        assert mask.is_active
        chance = random.Random(seed)
        data = b""
        for _ in range(3000):
            if not mask.is_active:
                break
            token_id = chance.choice(allowed(mask, read))
            assert not read.is_end(token_id)
            data += read.token_bytes(token_id)
            mask.accept(token_id)
        assert not mask.is_active
        calls = calls_in(family, text + data.decode(), (PICK,))
        assert calls, text + data.decode()
        assert all(argument_checker((PICK,))(*call) for call in calls), text + data.decode()


def test_a_word_begins_no_call() -> None:
    assert FAMILIES.keys() - set(MARKED) == {"phi4"}
    assert triggered_calls(FAMILIES["phi4"], TOOLS) == {}


def opened(family: str, read: HfTokenizer, plan: ReasoningPlan | None = None) -> AnswerMask:
    grammar = bare_call_grammar(FAMILIES[family], (PICK, EMPTY))
    assert grammar is not None
    return AnswerMask(read, bare_call=(grammar, read.mask(grammar.constraint)), reasoning=plan)


def push(mask: AnswerMask, read: HfTokenizer, text: str) -> None:
    for token_id in read.encode(text, add_bos=False, parse_special=False):
        mask.accept(token_id)


BARE = [name for name, family in FAMILIES.items() if family.main is None]
BARE_STARTS = {
    "json": '{"name": "pick"',
    "fence": '```json\n{ "name":"pick"',
    "tag": '<|python_tag|>{"name": "pick"',
    "python": " [pick(",
    "word": "functools[",
}


@pytest.mark.parametrize("start", BARE_STARTS)
@pytest.mark.parametrize("family", BARE)
def test_an_answer_that_begins_as_a_call_is_a_valid_one(
    family: str, start: str, vocabulary: Any
) -> None:
    read = vocabulary(family)
    is_meant = (start == "python") is FAMILIES[family].is_pythonic
    is_meant = is_meant and (start != "word" or FAMILIES[family].is_start_ambiguous)
    for seed in range(3):
        mask = opened(family, read)
        push(mask, read, BARE_STARTS[start])
        assert mask.is_active is is_meant
        if not is_meant:
            return
        chance, data = random.Random(seed), b""
        while mask.is_active and len(data) < 3000:
            token_id = chance.choice(allowed(mask, read))
            data += read.token_bytes(token_id)
            mask.accept(token_id)
        assert not mask.is_active
        text = BARE_STARTS[start] + data.decode()
        calls = calls_in(family, text, (PICK, EMPTY))
        assert calls, text
        assert all(argument_checker((PICK, EMPTY))(*call) for call in calls), text


FREE_STARTS = (
    'See: {"name": "pick"',
    '{"name": "Anna"',
    '{"pick": ',
    "[pick",
    "x" * 400 + '{"name": "pick"',
)


@pytest.mark.parametrize("text", FREE_STARTS, ids=lambda text: text[:12])
@pytest.mark.parametrize("family", ["hermes", "pythonic", "phi4"])
def test_an_answer_that_begins_otherwise_is_free(family: str, text: str, vocabulary: Any) -> None:
    read = vocabulary(family)
    mask = opened(family, read)
    push(mask, read, text)
    assert not mask.is_active


def test_a_call_after_the_reasoning_begins_the_answer(vocabulary: Any) -> None:
    read = vocabulary("hermes")
    mask = opened("hermes", read, ReasoningPlan(THINK, is_open=True))
    push(mask, read, BARE_STARTS["json"])
    assert not mask.is_active
    push(mask, read, f"</think>\n\n{BARE_STARTS['json']}")
    assert mask.is_active


def test_harmony_has_no_bare_calls() -> None:
    assert bare_call_grammar(FAMILIES["harmony"], TOOLS) is None
    assert bare_call_grammar(FAMILIES["hermes"], ()) is None


@pytest.mark.parametrize("style", [{"separators": (",", ":")}, {"indent": 2}, {}], ids=str)
def test_a_begun_call_keeps_the_models_style(style: dict[str, Any], tmp_path: Path) -> None:
    read = tokenizer(tmp_path / "v", special=())
    call = {"name": "pick", "parameters": {"color": "red", "count": 3}}
    mask = begun("hermes", read, (PICK,))
    raw = f"<tool_call>{json.dumps(call, **style)}</tool_call>"
    for token_id in read.encode(raw, add_bos=False, parse_special=True):
        assert not mask.is_active or token_id in allowed(mask, read)
        mask.accept(token_id)
    assert not mask.is_active


def test_a_begun_call_has_no_endless_space(tmp_path: Path) -> None:
    read = tokenizer(tmp_path / "v", special=())
    (constraint,) = triggered_calls(FAMILIES["hermes"], (PICK,)).values()
    place = read.mask(constraint)
    assert place.restart(b'{"name": "pick", "arguments": {')
    (space,) = read.encode(" ", add_bos=False, parse_special=False)
    for _ in range(100):
        if space not in allowed(place, read):
            return
        place.accept(space)
    raise AssertionError("spaces without end")


@pytest.mark.parametrize("family", MARKED)
def test_a_begun_call_may_be_what_the_template_writes(family: str, vocabulary: Any) -> None:
    read = vocabulary(family)
    raw = written(family, Answer([("edit_file", {"path": 'ä"b', "count": 3})])).lstrip("\n")
    mask = begun(family, read, TOOLS)
    was_active = False
    for token_id in read.encode(raw, add_bos=False, parse_special=True):
        if mask.is_active:
            was_active = True
            assert token_id in allowed(mask, read), read.token_bytes(token_id)
        mask.accept(token_id)
    assert was_active


ESCAPED = r"\u00e4\ud83d\ude00\u4E16\n"
SLASHES = r"\/a\\/<\/b>\/\/"


@pytest.mark.parametrize("is_forced", [False, True])
@pytest.mark.parametrize("family", MARKED)
def test_arguments_may_hold_any_escape(family: str, is_forced: bool, vocabulary: Any) -> None:
    read = vocabulary(family)
    raw = written(family, Answer([("edit_file", {"path": "ZZZ", "count": 3})])).lstrip("\n")
    escaped = ESCAPED if FAMILIES[family].is_pythonic else ESCAPED + SLASHES
    raw = raw.replace("ZZZ", escaped)
    mask: TokenMask = begun(family, read, TOOLS)
    if is_forced:
        start = FAMILIES[family].tool_call_start if family != "harmony" else "<|channel|>"
        raw = raw[raw.index(start) :]
        mask = read.mask(call_constraint(FAMILIES[family], TOOLS))
    at = raw.index(escaped)
    for part in (raw[:at], escaped):
        for token_id in read.encode(part, add_bos=False, parse_special=True):
            assert token_id in allowed(mask, read), read.token_bytes(token_id)
            mask.accept(token_id)
    ((_, arguments),) = calls_in(family, raw, TOOLS)
    assert json.loads(arguments)["path"] in (escaped, json.loads(f'"{escaped}"'))


@pytest.mark.parametrize("name", ["think", "harmony"])
@pytest.mark.parametrize("is_open", [False, True])
@pytest.mark.parametrize("budget", [0, 3])
def test_a_reasoning_budget_forces_the_end(
    name: str, is_open: bool, budget: int, tmp_path: Path
) -> None:
    tags = THINK if name == "think" else HARMONY
    read = tokenizer(tmp_path / "v", special=("<think>", "</think>", *FAMILIES["harmony"].markers))
    mask = AnswerMask(read, reasoning=ReasoningPlan(tags, is_open, budget))
    opening = [] if is_open else read.encode(tags.open, add_bos=False, parse_special=True)
    free = read.encode("abcdefgh", add_bos=False, parse_special=False)[:budget]
    for token_id in (*opening, *free):
        assert not mask.is_active
        mask.accept(token_id)
    end = tags.forced or tags.close
    for token_id in read.encode(end, add_bos=False, parse_special=True):
        assert allowed(mask, read) == [token_id]
        mask.accept(token_id)
    assert not mask.is_active


def test_a_call_within_reasoning_is_free(tmp_path: Path) -> None:
    read = tokenizer(tmp_path / "v", special=("<think>", "</think>", "<tool_call>"))
    ((start, constraint),) = triggered_calls(FAMILIES["hermes"], (PICK,)).items()
    plan = ReasoningPlan(THINK, is_open=True)
    mask = AnswerMask(read, triggered=[(start, read.mask(constraint))], reasoning=plan)
    for text, is_active in (("<tool_call>x", False), ("</think>\n\n", False), (start, True)):
        for token_id in read.encode(text, add_bos=False, parse_special=True):
            mask.accept(token_id)
        assert mask.is_active is is_active


def test_a_begun_call_that_came_with_more_text_goes_on_there(tmp_path: Path) -> None:
    read = tokenizer(tmp_path / "v", special=())
    (constraint,) = triggered_calls(FAMILIES["hermes"], (PICK,)).values()
    place = read.mask(constraint)
    assert place.restart(b'\n{"name": "pi')
    assert {read.token_bytes(i)[:1] for i in allowed(place, read)} == {b"c"}
    assert not place.restart(b"nothing of the kind")


BAD_SCHEMAS: list[dict[str, Any]] = [
    {"type": "nothing"},
    {"type": "object", "properties": {"a": {"type": "string", "pattern": "foo**"}}},
    {"type": "object", "properties": {"a": {"type": 3}}},
    {"$ref": "#/$defs/gone"},
]


@pytest.mark.parametrize("schema", BAD_SCHEMAS, ids=str)
def test_i9_a_tool_with_a_bad_schema_is_refused(schema: dict[str, Any], tmp_path: Path) -> None:
    read = tokenizer(tmp_path / "v", special=())
    tool = Tool("bad", "", schema)

    def forced() -> None:
        read.mask(call_constraint(FAMILIES["hermes"], (tool,)))

    def is_begun() -> None:
        begun("hermes", read, (tool,))

    for make in (forced, is_begun):
        with pytest.raises(RequestError, match="tools cannot be enforced") as caught:
            make()
        assert caught.value.param == "tools"


def test_i9_arguments_may_refer_to_their_own_kind(tmp_path: Path) -> None:
    read = tokenizer(tmp_path / "v", special=())
    tree: dict[str, Any] = {
        "type": "object",
        "properties": {"child": {"$ref": "#"}, "leaf": {"$ref": "#/$defs/leaf"}},
        "$defs": {"leaf": {"enum": ["x"]}},
    }
    mask = read.mask(call_constraint(FAMILIES["hermes"], (Tool("grow", "", tree),)))
    text = '<tool_call>\n{"name": "grow", "arguments": {"child": {"child": {}, "leaf": "x"}}}'
    for token_id in read.encode(text, add_bos=False, parse_special=True):
        assert token_id in allowed(mask, read)
        mask.accept(token_id)


UNKNOWN: list[dict[str, Any]] = [
    {"type": "string", "format": "some-format-of-ours"},
    {"type": "string", "pattern": "^(?!x).*$"},
    {"type": "string", "pattern": "\\bword\\b"},
    {"not": {"type": "string"}},
    {"type": "array", "uniqueItems": True},
    {"if": {"const": 1}, "then": {"type": "integer"}},
]


@pytest.mark.parametrize("inner", UNKNOWN, ids=str)
def test_a_begun_call_leaves_free_what_no_grammar_holds(
    inner: dict[str, Any], tmp_path: Path
) -> None:
    read = tokenizer(tmp_path / "v", special=())
    schema: dict[str, Any] = {"properties": {"a": inner}}
    with pytest.raises(RequestError):
        read.mask(call_constraint(FAMILIES["hermes"], (Tool("f", "", schema),)))
    for constraint in triggered_calls(FAMILIES["hermes"], (Tool("f", "", schema),)).values():
        assert read.mask(constraint).is_active
