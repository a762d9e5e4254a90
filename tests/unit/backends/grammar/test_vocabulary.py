"""The vocabulary of grammars: read from tokens alone, as good as llguidance's own reading."""

import random
from collections.abc import Iterator

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from backends.grammar.compiler import output_constraint
from backends.grammar.vocabulary import Vocabulary
from backends.hf.pieces import piece_reader
from core.types import ChoiceOutput, JsonOutput, Output, RegexOutput

END = "<|end|>"
TEXTS = ('{"name": "value", "count": 12}', "hello hello world", "red, green and blue", "größe")
OUTPUTS: tuple[Output, ...] = (
    JsonOutput(),
    JsonOutput(
        {
            "type": "object",
            "properties": {"name": {"type": "string"}, "count": {"type": "integer"}},
            "required": ["name", "count"],
        }
    ),
    RegexOutput("[a-z]{3,9}(red|größe)?", "guided_regex"),
    ChoiceOutput(("hello world", "hello hello", "ü"), "guided_choice"),
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    return made


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    reader = piece_reader(tokenizer)
    texts = [tokenizer.id_to_token(each) or "" for each in range(tokenizer.get_vocab_size())]
    tokens = [END.encode() if text == END else reader.read(text) for text in texts]
    end = texts.index(END)
    return Vocabulary(tokens, [end], [end])


def steps(matchers: tuple[LLMatcher, LLMatcher], seed: int) -> Iterator[tuple[bytes, bytes]]:
    chance = random.Random(seed)
    for _ in range(40):
        if matchers[0].is_stopped():
            return
        masks = (matchers[0].compute_bitmask(), matchers[1].compute_bitmask())
        yield masks
        allowed = [each for each in range(8 * len(masks[0])) if masks[0][each // 8] >> each % 8 & 1]
        chosen = chance.choice(allowed)
        for matcher in matchers:
            matcher.consume_token(chosen)


@pytest.mark.parametrize("output", OUTPUTS)
def test_masks_are_those_of_the_librarys_own_reading(
    tokenizer: Tokenizer, vocabulary: Vocabulary, output: Output
) -> None:
    theirs = LLTokenizer(tokenizer.to_str(), eos_token=list(vocabulary.ends))
    ours = vocabulary.tokenizer()
    grammar = LLMatcher.grammar_from_lark(output_constraint(output).grammar)
    compared = 0
    for seed in range(5):
        matchers = (LLMatcher(theirs, grammar), LLMatcher(ours, grammar))
        for expected, found in steps(matchers, seed):
            compared += 1
            assert found == expected
    assert compared > 5


@pytest.mark.parametrize("text", [*TEXTS, "", "\0", END])
def test_text_is_split_into_tokens_that_together_are_it(vocabulary: Vocabulary, text: str) -> None:
    ids = vocabulary(text)
    assert b"".join(vocabulary.tokens[each] for each in ids) == text.encode()
    assert not set(ids) & set(vocabulary.special)
    assert vocabulary(text.encode()) == ids


def test_a_vocabulary_without_an_end_or_with_empty_tokens_still_makes_masks() -> None:
    made = Vocabulary([b"a", b"", b"b", b"", b"a"], [], []).tokenizer()
    matcher = LLMatcher(made, LLMatcher.grammar_from_lark("start: /[ab]+/\n"))
    assert not matcher.is_error()
    mask = matcher.compute_bitmask()
    assert mask[0] & 0b10101 == 0b10101
    assert not mask[0] & 0b1010
