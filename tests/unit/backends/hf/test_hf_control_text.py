"""Tests of Hugging Face tokenizers with control tokens' names in a text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.control_tokens import PromptPart
from backends.hf.tokenizer import HfTokenizer
from tests.unit.backends.hf.test_hf_tokenizer import (
    END,
    START,
    THINK,
    opened,
    sentencepiece_like,
    tiny,
)


def byte_level() -> Any:
    return tiny(plain=("\n\n", "<table>"))


def stripping() -> Any:
    """Phi-3's tokens take the blanks around them."""
    from tokenizers import AddedToken

    tokenizer = tiny(special=(START,))
    tokenizer.add_special_tokens([
        AddedToken(END, lstrip=True, rstrip=True), AddedToken(THINK, rstrip=True)
    ])  # fmt: skip
    return tokenizer


def word_marks() -> Any:
    """Only the first word of the whole prompt gets a mark."""
    from tokenizers import pre_tokenizers

    tokenizer = sentencepiece_like()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.add_special_tokens([START, END, THINK])
    return tokenizer


def all_marks() -> Any:
    tokenizer = sentencepiece_like()
    tokenizer.add_special_tokens([START, END, THINK])
    return tokenizer


def unigram() -> Any:
    """Its names are pieces of the vocabulary as well."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    pieces = [("<unk>", 0.0), (START, -1.0), (END, -1.0), (THINK, -1.0)]
    pieces += [(each, -2.0) for each in "▁helowrdT<|imstarend_>kn/ x"]
    tokenizer = Tokenizer(models.Unigram(pieces, 0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens([START, END, THINK])
    return tokenizer


def merged() -> Any:
    """Merges of byte pairs make a name, as conversions from SentencePiece write them."""
    from tokenizers import Tokenizer, models

    letters = ["i", "im", "im_", "im_s", "im_st", "im_sta", "im_star"]
    names = [*"<|>imstarend_thk helowrd\nx/T", START, END, THINK, *letters, "im_start"]
    names += ["<|", "<|im_start", "|>"]
    base = {name: at for at, name in enumerate(dict.fromkeys(names))}
    merges = [(letters[at], letters[at + 1][-1]) for at in range(len(letters) - 1)]
    merges += [("im_star", "t"), ("<", "|"), ("<|", "im_start"), ("|", ">"), ("<|im_start", "|>")]
    tokenizer = Tokenizer(models.BPE(base, merges))
    tokenizer.add_special_tokens([START, END, THINK])
    return tokenizer


KINDS = [byte_level, stripping, word_marks, all_marks, unigram, merged]
NAMES = frozenset([START, END, THINK])


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> HfTokenizer:
    make: Callable[[], Any] = request.param
    return opened(tmp_path, make())


def parts_of(*texts: str) -> list[PromptPart]:
    return [PromptPart(text, text in NAMES) for text in texts]


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_name_in_a_text_is_several_tokens(tokenizer: HfTokenizer, name: str) -> None:
    control = tokenizer.special_id(name)
    assert control is not None
    text = PromptPart(f"hello {name} world{name}")
    ids = tokenizer.encode_parts(
        [*parts_of(START), text, *parts_of(END, "hello")], NAMES, add_bos=False
    )
    expected = {START: 1, END: 1}.get(name, 0)
    assert ids.count(control) == expected
    assert len(ids) > len(tokenizer.encode(f"{START}hello{END}", add_bos=False, parse_special=True))


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(
        st.one_of(
            st.sampled_from([START, END, THINK]),
            st.text(alphabet="helo wrd\n x", min_size=1, max_size=12),
        ),
        max_size=8,
    )
)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_parts_without_names_are_encoded_like_the_whole(
    kind: Callable[[], Any], tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    tokenizer = _kept(kind, tmp_path_factory)
    whole = tokenizer.encode("".join(texts), add_bos=True, parse_special=True)
    assert tokenizer.encode_parts(parts_of(*texts), NAMES, add_bos=True) == whole


_KEPT: dict[str, HfTokenizer] = {}


def _kept(kind: Callable[[], Any], factory: pytest.TempPathFactory) -> HfTokenizer:
    if kind.__name__ not in _KEPT:
        _KEPT[kind.__name__] = opened(factory.mktemp(kind.__name__), kind())
    return _KEPT[kind.__name__]


def test_other_added_tokens_stay_tokens_in_a_text(tmp_path: Path) -> None:
    tokenizer = opened(tmp_path, byte_level())
    table = tokenizer.special_id("<table>")
    ids = tokenizer.encode_parts([PromptPart(f"a<table>{END}")], NAMES, add_bos=False)
    assert table in ids
    assert tokenizer.special_id(END) not in ids


def test_no_text_can_write_what_stands_for_a_control_token(tmp_path: Path) -> None:
    first = opened(tmp_path / "a", tiny())
    first.encode_parts(parts_of("x"), NAMES, add_bos=False)
    (encoder,) = first._part_encoders.values()
    second = opened(tmp_path / "b", tiny())
    for alias in encoder._aliases.values():
        ids = second.encode_parts([PromptPart(alias)], NAMES, add_bos=False)
        assert not {second.special_id(name) for name in NAMES}.intersection(ids)


def test_a_tokenizer_that_cannot_be_copied_still_encodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no copy")

    monkeypatch.setattr("backends.hf.control_text._renamed", fail)
    tokenizer = opened(tmp_path, tiny())
    ids = tokenizer.encode_parts(parts_of(START, "hello", END), NAMES, add_bos=False)
    assert ids == tokenizer.encode(f"{START}hello{END}", add_bos=False, parse_special=True)
    assert "cannot be renamed" in caplog.text
