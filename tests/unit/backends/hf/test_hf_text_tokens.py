"""Tests of control tokens' names in the texts of embeddings and reranking."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from backends.embedding.texts import TextInputs
from backends.hf.tokenizer import HfTokenizer
from tests.unit.backends.hf.test_hf_control_text import KINDS
from tests.unit.backends.hf.test_hf_tokenizer import END, START, THINK, opened

FRAME = (START, END)


def framed(tokenizer: Any, names: tuple[str, str] = FRAME) -> Any:
    """Put the first of `names` before each text and the second after it, as BERT's do."""
    from tokenizers import processors

    before, after = names
    ids = [(name, tokenizer.token_to_id(name)) for name in dict.fromkeys(names)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{before} $A {after}",
        pair=f"{before} $A {after} $B:1 {after}:1",
        special_tokens=ids,
    )
    return tokenizer


def word_pieces(*, lowercase: bool = True) -> Any:
    """BERT's."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused0]"]
    words = ["[", "]", "sep", "SEP", "cls", "mask", "unk", "hello", "world", "##s", "##r", "<", "/"]
    words += ["wo", "##ld", ">", "x", "s"]
    vocabulary = {word: at for at, word in enumerate([*names, *words])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(names[:5])
    return framed(tokenizer, ("[CLS]", "[SEP]"))


def pieces_with_normal_form() -> Any:
    """XLM-R's: a normal form that makes other characters a name, whose name is a piece too."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(each, -2.0) for each in "▁helowrdTs<>/kn x"]
    tokenizer = Tokenizer(models.Unigram([*pieces, ("<mask>", 0.0)], 3, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    return framed(tokenizer, ("<s>", "</s>"))


def framed_kind(kind: Callable[[], Any]) -> Any:
    return framed(kind())


ENCODERS: dict[str, Callable[[], Any]] = {
    **{kind.__name__: partial(framed_kind, kind) for kind in KINDS},
    "word_pieces": word_pieces,
    "cased": lambda: word_pieces(lowercase=False),
    "pieces_with_normal_form": pieces_with_normal_form,
}


@pytest.fixture(scope="module", params=ENCODERS)
def original(request: pytest.FixtureRequest) -> Any:
    return ENCODERS[request.param]()


@pytest.fixture(scope="module")
def tokenizer(original: Any, tmp_path_factory: pytest.TempPathFactory) -> HfTokenizer:
    return opened(tmp_path_factory.mktemp("tokenizer"), original)


def names_of(original: Any) -> dict[str, int]:
    added = original.get_added_tokens_decoder()
    return {token.content: at for at, token in added.items() if token.special}


def test_a_name_in_an_input_is_text(original: Any, tokenizer: HfTokenizer) -> None:
    inputs = TextInputs(tokenizer)
    before, after = inputs.special_tokens
    names = names_of(original)
    assert len(before) == len(after) == 1
    for name in names:
        ids = inputs.tokenize(f"hello {name} world{name}")
        assert tuple(ids[:1]) == before
        assert tuple(ids[-1:]) == after
        part = inputs.tokenize_part(f"hello {name} world{name}")
        assert part == ids[1:-1]
        # Characters that the vocabulary lacks are the unknown token still.
        found = set(part).intersection(names.values())
        assert found <= {names.get("[UNK]"), names.get("<unk>")}
        assert len(part) > len(original.encode(f"hello {name}", add_special_tokens=False).ids)


def test_without_the_names_the_rest_is_as_it_was(original: Any, tokenizer: HfTokenizer) -> None:
    around = original.encode("hello", add_special_tokens=True).ids
    for name in names_of(original):
        ids = tokenizer.encode_for_embedding(f"hello {name}")
        assert ids[: len(around) - 1] == around[:-1]


LETTERS = [*"helowrds <>[]/|_\n", "▁", "é", "中", "ﬁ", "＜", "̈"]
TEXTS = st.text(st.sampled_from(LETTERS), max_size=30)


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, prompt=TEXTS)
def test_other_texts_are_tokenized_as_the_library_does(
    original: Any, tokenizer: HfTokenizer, text: str, prompt: str
) -> None:
    whole = original.encode(prompt + text, add_special_tokens=True).ids
    bare = original.encode(text, add_special_tokens=False).ids
    inner = whole[1:-1]
    unknown = {each for name, each in names_of(original).items() if name in ("[UNK]", "<unk>")}
    # A name by chance.
    assume(not (set(inner + bare) & set(names_of(original).values())) - unknown)
    assert tokenizer.encode_for_embedding(text, prompt) == whole
    assert tokenizer.encode_text(text) == bare
    # The way of texts with names gives the same.
    assert tokenizer._encode_markup([(prompt, True), (text, False)]) == inner
    assert tokenizer._encode_markup([(text, False)]) == bare


def test_names_in_a_models_own_prompt_are_control_tokens(
    original: Any, tokenizer: HfTokenizer
) -> None:
    for name, token_id in names_of(original).items():
        prompt = f"hello{name}x: "
        whole = original.encode(f"{prompt}hello world", add_special_tokens=True).ids
        assert tokenizer.encode_for_embedding("hello world", prompt) == whole
        named = tokenizer.encode_for_embedding(f"hello {name}", prompt)
        unknown = name in ("[UNK]", "<unk>")
        assert unknown or named.count(token_id) == whole.count(token_id)


def test_the_normal_form_of_a_text_makes_no_control_token(tmp_path: Path) -> None:
    made = pieces_with_normal_form()
    tokenizer = opened(tmp_path, made)
    end = made.token_to_id("</s>")
    assert made.encode("hello ＜/s＞", add_special_tokens=False).ids.count(end) == 1
    assert end not in tokenizer.encode_text("hello ＜/s＞")
    assert tokenizer.encode_for_embedding("hello ＜/s＞").count(end) == 1


def test_a_thinking_tag_that_is_an_added_token_is_text(tmp_path: Path) -> None:
    tokenizer = opened(tmp_path, framed(KINDS[0]()))
    assert tokenizer.special_id(THINK) not in tokenizer.encode_text(f"a {THINK} b")
