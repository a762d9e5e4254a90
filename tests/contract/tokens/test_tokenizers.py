"""Tests of llama.cpp's tokenizers with text that would overflow the stack or take minutes."""

import random
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from backends.gguf import pieces
from backends.gguf.model import GgufModel, library
from backends.grammar.constraint import Constraint
from core.errors import RequestError
from tests.gguf_files import vocabulary_gguf

# Their regexes run in std::regex, which recurses once per character.
RECURSIVE = (
    "afmoe", "bailingmoe", "bloom", "deepseek-coder", "deepseek-llm", "deepseek-v3", "default",
    "exaone-moe", "falcon", "gpt-4o", "hunyuan-dense", "jais-2", "joyai-llm", "llama4", "llada-moe",
    "minimax-m2", "poro-chat", "seed-coder", "superbpe", "tekken", "tiny_aya", "viking", "youtu",
)  # fmt: skip
OTHERS = (
    "chameleon", "command-r", "dbrx", "gemma4", "gpt-2", "kimi-k2", "llama-bpe", "qwen2", "qwen35",
    "sarvam-moe", "smollm", "stablelm2", "starcoder",
)  # fmt: skip
RUNS = {
    "letters": "a", "capitals": "AB", "blanks": " ", "lines": "\n", "digits": "1", "signs": "!",
    "Han": "中", "emoji": "😀", "accents": "e\u0301", "Hangul": "가",
}  # fmt: skip
ODD = [
    "a", "B", "1", " ", "  ", "\n", "\n\n", "\r\n", "\t", "中", "é", "e\u0301", "\u0301", "😀",
    "\0", "\x01", "\x7f", "\u200b", "\ufeff", "▁", "<", "|", ">", "'s", "<|im_end|>", "<0x0A>",
    "\U0010ffff", "\ue000", "\uffff", "ʰ", "١", "ß", "İ", "．", "\u3000", "\u2028", "\x85", "\\",
]  # fmt: skip
WORDS = st.sampled_from(
    [
        "once",
        "upon",
        "a",
        "The",
        "x1",
        "12345",
        "it's",
        "...",
        "中文",
        "é",
        " ",
        "\n",
        "\n\n",
        "  ",
        "!",
    ]
)


@pytest.fixture(scope="module")
def open_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that opens a model without weights with this pre-tokenizer."""
    library_defaults = library().llama_model_default_params
    folder = tmp_path_factory.mktemp("vocabularies")
    opened: dict[str, GgufModel] = {}

    def vocabulary_only() -> Any:
        params = library_defaults()
        params.vocab_only = True
        return params

    def open_one(pre_tokenizer: str, **options: Any) -> GgufModel:
        name = f"{pre_tokenizer}{sorted(options)}"
        if name not in opened:
            path = vocabulary_gguf(folder / f"{len(opened)}.gguf", pre_tokenizer, **options)
            opened[name] = GgufModel(path)
        return opened[name]

    patch = pytest.MonkeyPatch()
    patch.setattr(library(), "llama_model_default_params", vocabulary_only)
    yield open_one
    patch.undo()
    for model in opened.values():
        model.close()


@pytest.mark.parametrize("pre_tokenizer", [*RECURSIVE, "gpt-2"])
def test_long_runs_of_one_character_do_not_end_the_process(
    open_vocabulary: Any, pre_tokenizer: str
) -> None:
    model = open_vocabulary(pre_tokenizer)
    for unit in RUNS.values():
        text = unit * (60_000 // len(unit)) + "中"
        ids = model.encode(text, add_bos=True, parse_special=True)
        assert b"".join(map(model.token_bytes, ids)).decode() == text


def test_a_run_longer_than_a_piece_keeps_every_byte(open_vocabulary: Any) -> None:
    model = open_vocabulary("deepseek-v3")
    text = "a" * (2 * pieces.PIECE_CHARACTERS + 7)
    ids = model.encode(text, add_bos=True, parse_special=True)
    assert b"".join(map(model.token_bytes, ids)).decode() == text


def test_a_grammar_that_forces_a_long_run_does_not_end_the_process(open_vocabulary: Any) -> None:
    model = open_vocabulary("deepseek-llm")
    mask = model.mask(Constraint(f'start: "{"a" * 60_000}"\n', "p"))
    for _ in range(3):
        logits = np.zeros(model.vocabulary_size, np.float32)
        mask.apply(logits)
        assert model.token_bytes(int(logits.argmax())) == b"a"
        mask.accept(int(logits.argmax()))


@pytest.mark.parametrize("pre_tokenizer", ["deepseek-llm", "superbpe"])
def test_runs_for_which_a_regex_takes_quadratic_time_are_cut(
    open_vocabulary: Any, pre_tokenizer: str
) -> None:
    model = open_vocabulary(pre_tokenizer)
    # Uncut, each of these would take over a minute.
    for text in (" " * 60_000 + "中", "1" * 60_000):
        ids = model.encode(text, add_bos=False, parse_special=True)
        assert b"".join(map(model.token_bytes, ids)).decode() == text


@pytest.mark.parametrize("pre_tokenizer", [*RECURSIVE, *OTHERS])
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(WORDS, min_size=20, max_size=60))
@example(parts=["once", "\n", "upon", " ", "a"] * 10)
@example(parts=["it's", "\n\n", "upon", "  ", "a", "\n", "The", " ", "x1"] * 6)
def test_cutting_changes_no_tokens(
    open_vocabulary: Any, pre_tokenizer: str, parts: list[str]
) -> None:
    model, text = open_vocabulary(pre_tokenizer), "".join(parts)
    whole = model.encode(text, add_bos=True, parse_special=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_CHARACTERS", 40)
        cut = list(pieces.text_pieces(text, pre_tokenizer))
    each = [model.encode(piece, add_bos=False, parse_special=True) for piece in cut]
    begin = [] if not model.adds_bos else whole[:1]
    assert "".join(cut) == text
    if all(len(piece) < 40 for piece in cut):
        assert [*begin, *chain(*each)] == whole


def test_digits_are_grouped_alike_when_a_run_is_cut(open_vocabulary: Any) -> None:
    model = open_vocabulary("superbpe")
    text = "a" + "1234567890" * 37 + "b"
    data, size = text.encode(), len(text) + 8
    buffer = (library().llama_token * size)()
    count = library().llama_tokenize(model.vocabulary, data, len(data), buffer, size, False, True)
    cut = list(pieces.text_pieces(text, "superbpe"))
    each = [model.encode(piece, add_bos=False, parse_special=True) for piece in cut]
    assert len(cut) > 2
    assert list(chain(*each)) == list(buffer[:count])


def test_blanks_in_a_row_do_not_abort_the_process(open_vocabulary: Any) -> None:
    model = open_vocabulary("whitespace")
    for text in ("a  b", "a\n\nb", " \t \u3000 ", "a \r\n" * 2000, "  "):
        model.encode(text, add_bos=True, parse_special=True)
        model.fewest_tokens(text * 100, 10)
    assert model.encode("once  once", add_bos=False, parse_special=True)


def test_unknown_characters_take_sentencepiece_no_quadratic_time(
    open_vocabulary: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_vocabulary("default", kind="sentencepiece")
    # Uncut, this takes over a minute.
    assert len(model.encode("中" * 400_000, add_bos=True, parse_special=True)) == 1_200_002
    monkeypatch.setattr("backends.gguf.tokenization._UNCUT_CHARACTERS", 0)
    monkeypatch.setattr(pieces, "_UNKNOWN_AT_ONCE", 3)
    text = "once 中文 upon\n\na 中\ntime 🎈🎈  once\n" * 120
    assert len(list(pieces.cut_before_unknown(text, "中文🎈\n"))) > 20
    cut = model.encode(text, add_bos=True, parse_special=True)
    monkeypatch.setattr(pieces, "_UNKNOWN_AT_ONCE", 1 << 30)
    assert cut == model.encode(text, add_bos=True, parse_special=True)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_special_tokens_take_no_quadratic_time(
    open_vocabulary: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model = open_vocabulary("qwen2", kind=kind)
    special = "</s>" if kind == "sentencepiece" else "<|im_end|>"
    # Uncut, this takes minutes.
    ids = model.encode(f"{special}once" * 50_000, add_bos=True, parse_special=True)
    assert ids.count(model.encode(special, add_bos=False, parse_special=True)[0]) == 50_000
    text = f"{special}once upon{special}{special} a 中 {special}\n\n time中{special}中 " * 120
    monkeypatch.setattr("backends.gguf.tokenization._UNCUT_CHARACTERS", 0)
    monkeypatch.setattr(pieces, "_SPECIALS_AT_ONCE", 3)
    monkeypatch.setattr(pieces, "_UNKNOWN_AT_ONCE", 2)
    assert len(list(pieces.cut_after_specials(text, pieces.Specials([special])))) > 20
    cut = model.encode(text, add_bos=True, parse_special=True)
    monkeypatch.setattr(pieces, "_SPECIALS_AT_ONCE", 1 << 30)
    monkeypatch.setattr(pieces, "_UNKNOWN_AT_ONCE", 1 << 30)
    assert cut == model.encode(text, add_bos=True, parse_special=True)


@pytest.mark.parametrize("pre_tokenizer", [*RECURSIVE, *OTHERS, "whitespace", "laguna", "minicpm5"])
def test_no_text_ends_the_process(open_vocabulary: Any, pre_tokenizer: str) -> None:
    model = open_vocabulary(pre_tokenizer)
    choose = random.Random(1)
    for _ in range(150):
        text = "".join(choose.choice(ODD) for _ in range(choose.randint(0, 40)))
        model.encode(text, add_bos=True, parse_special=choose.random() < 0.5)


def test_unpaired_surrogates_are_refused(open_vocabulary: Any) -> None:
    for text in ("\ud800", "a" * 5000 + "\udfff"):
        with pytest.raises(RequestError, match="surrogate"):
            open_vocabulary("gpt-2").encode(text, add_bos=True, parse_special=True)


def test_sentencepiece_without_byte_tokens_refuses_unknown_characters(open_vocabulary: Any) -> None:
    model = open_vocabulary("default", kind="sentencepiece", has_bytes=False)
    assert model.encode("once upon a time", add_bos=True, parse_special=True)
    with pytest.raises(RequestError, match="no token for '中'"):
        model.encode("once 中", add_bos=True, parse_special=True)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_a_text_that_cannot_fit_is_bounded_from_below(open_vocabulary: Any, kind: str) -> None:
    model = open_vocabulary("default", kind=kind)
    assert model.fewest_tokens("once upon a time " * 10, 100) == 0
    for text in ("a" * 100_000, "once upon a time " * 20_000, " " * 500_000):
        bound = model.fewest_tokens(text, 100)
        assert 100 < bound <= len(model.encode(text, add_bos=False, parse_special=True))
