"""Tests of the grammar compiler: allowed answers, rejected grammars, and the cache."""

import json
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher

from backends.grammar.compiler import GrammarCompiler, output_constraint
from backends.grammar.trial import GrammarTrial, Verdict
from backends.hf.tokenizer import HfTokenizer
from core.errors import RequestError, UnsupportedParameter
from core.types import ChoiceOutput, GrammarOutput, JsonOutput, JsonValue, Output, RegexOutput

END = "<|end_of_text|>"


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> HfTokenizer:
    """Return a vocabulary of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=257,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["a"], trainer)
    folder = tmp_path_factory.mktemp("vocabulary")
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    return HfTokenizer(folder)


def fits(read: HfTokenizer, output: Output, text: str) -> bool:
    """Return whether the mask allows exactly `text`, and the end after it."""
    mask = read.mask(output_constraint(output))
    for token_id in [*read.encode(text, add_bos=False, parse_special=False), -1]:
        logits = np.zeros(read.vocabulary_size + 3, np.float32)
        mask.apply(logits)
        assert not np.isfinite(logits[read.vocabulary_size :]).any()
        wanted = next(iter(read.end_ids)) if token_id < 0 else token_id
        if not np.isfinite(logits[wanted]):
            return False
        mask.accept(wanted)
    return True


@pytest.mark.parametrize(
    ("output", "good", "bad"),
    [
        (RegexOutput(r"[a-c]{2}\d+/\"", "p"), 'ab12/"', "abx"),
        (RegexOutput("(a+)+$", "p"), "aaaa", "b"),
        (RegexOutput("^ja|nein$", "p"), "nein", "jan"),
        (RegexOutput("grün|é🎈", "p"), "é🎈", "e"),
        (ChoiceOutput(("yes", 'no "really"\n'), "p"), 'no "really"\n', "no"),
        (ChoiceOutput(("a\x7fb", "c"), "p"), "a\x7fb", "ab"),
        (GrammarOutput('root ::= "a" root | "b"', "p"), "aab", "aa"),
        (JsonOutput({"enum": [1, "a"]}), '"a"', "2"),
        (JsonOutput(), '{"a": 1}', "[1]"),
    ],
    ids=str,
)
def test_an_answer_is_bounded(read: HfTokenizer, output: Output, good: str, bad: str) -> None:
    assert fits(read, output, good)
    assert not fits(read, output, bad)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"anyOf": [schema, {"type": "array", "items": schema}]}
    return schema


BAD: list[Output] = [
    RegexOutput("foo**", "guided_regex"),
    RegexOutput("a{2}{3}+", "guided_regex"),
    RegexOutput("(a", "guided_regex"),
    RegexOutput("(?=a)b", "guided_regex"),
    RegexOutput(r"(a)\1", "guided_regex"),
    JsonOutput({"type": "string", "pattern": "foo**"}),
    JsonOutput({"type": "string", "pattern": "[a"}),
    JsonOutput({"type": "text"}),
    JsonOutput({"$ref": "#"}),
    JsonOutput({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#"}}}),
    JsonOutput({"$ref": "http://127.0.0.1:1/schema.json"}),
    JsonOutput({"enum": ["x" * 1_000_000]}),
    JsonOutput({"not": {"type": "string"}}),
    JsonOutput({"properties": {f"k{number}": {} for number in range(3000)}}),
]


@pytest.mark.parametrize("output", BAD, ids=lambda output: str(output)[:60])
def test_i5_what_cannot_be_enforced_is_refused(read: HfTokenizer, output: Output) -> None:
    with pytest.raises(RequestError) as caught:
        read.mask(output_constraint(output))
    assert caught.value.param in ("guided_regex", "response_format")
    assert len(caught.value.message) < 700
    assert fits(read, ChoiceOutput(("ok",), "p"), "ok")


@pytest.mark.parametrize("depth", [4, 12])
def test_i5_a_schema_that_branches_is_bounded(read: HfTokenizer, depth: int) -> None:
    with suppress(UnsupportedParameter):
        assert fits(read, JsonOutput(nested(depth)), '["a"]')


def test_i5_a_regex_that_grows_too_complex_is_a_problem_and_ends(read: HfTokenizer) -> None:
    bomb = RegexOutput("((a{1,1000}){1,1000}){1,1000}", "guided_regex")
    mask = read.mask(output_constraint(bomb))
    letter = read.encode("a", add_bos=False, parse_special=False)[0]
    for _ in range(200):
        mask.accept(letter)
        if mask.problem:
            break
    assert "too many" in mask.problem
    logits = np.zeros(read.vocabulary_size, np.float32)
    mask.apply(logits)
    assert read.is_end(int(logits.argmax()))


class NoTrial(GrammarTrial):
    """Allows each grammar."""

    def run(self, grammar: str) -> Verdict:
        del grammar
        return Verdict("")


class Quick(GrammarCompiler):
    """Takes one compiled grammar for all."""

    def __init__(self, read: HfTokenizer) -> None:
        read.mask(output_constraint(JsonOutput()))
        assert read._compiler is not None
        vocabulary = read._read_vocabulary()
        super().__init__(vocabulary, lambda _: None)
        self.compiled = 0
        self._one = super()._compiled("start: /a/\n", "p")
        self._trial = NoTrial(vocabulary)

    def _compiled(self, text: str, param: str, *, is_background: bool = False) -> LLMatcher:
        del text, param, is_background
        self.compiled += 1
        return self._one


def test_i6_ten_thousand_schemas_leave_a_bounded_cache(read: HfTokenizer) -> None:
    quick = Quick(read)
    for number in range(10_000):
        quick.mask(output_constraint(JsonOutput({"const": number})))
        assert quick.kept[0] <= 64
    assert quick.compiled == 10_000
    assert quick.kept[0] == 64
    assert quick.kept[1] <= 128 * 2**20


def test_i6_large_grammars_make_room_for_each_other(read: HfTokenizer) -> None:
    quick = Quick(read)
    for number in range(40):
        values: list[JsonValue] = [f"{number}{'x' * 1000}{index}" for index in range(80)]
        quick.mask(output_constraint(JsonOutput({"enum": values})))
        assert quick.kept[1] <= 128 * 2**20
    assert 1 < quick.kept[0] < 40


def test_i6_a_grammar_larger_than_the_cache_drops_no_others(read: HfTokenizer) -> None:
    quick = Quick(read)
    quick.mask(output_constraint(JsonOutput({"const": 1})))
    before = quick.kept
    values: list[JsonValue] = [f"{'x' * 1000}{index}" for index in range(480)]
    for _ in range(2):
        quick.mask(output_constraint(JsonOutput({"enum": values})))
        assert quick.kept == before
    quick.mask(output_constraint(JsonOutput({"const": 1})))
    assert quick.compiled == 3


def test_an_equal_grammar_is_compiled_once_and_used_apart(read: HfTokenizer) -> None:
    first = read.mask(output_constraint(ChoiceOutput(("ab",), "p")))
    first.accept(read.encode("a", add_bos=False, parse_special=False)[0])
    compiler = read._compiler
    assert compiler is not None
    before = compiler.kept
    assert fits(read, ChoiceOutput(("ab",), "p"), "ab")
    assert compiler.kept == before
