"""Tests of Hugging Face tokenizers: every way of writing bytes, special tokens, grammars."""

import json
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backends.grammar.compiler import output_constraint
from backends.hf.pieces import byte_alphabet
from backends.hf.tokenizer import HfTokenizer
from core.errors import BrokenModel, RequestError, UnsupportedParameter
from core.types import JsonOutput

TEXTS = [
    "The sea is blue and wide.",
    "  two  spaces\tand\n\nlines \r\n",
    "grüße, 海, 🎈🎉 naïve café Ωμέγα",
    "def f(x):\n    return x + 1234567890\n",
    "<not> a <|token|>",
    " ",
    "\u200b\ufeff\u0000end",
]
CORPUS = [*TEXTS, "hello world this is a text about the sea", "once upon a time"] * 3
END, START, THINK = "<|im_end|>", "<|im_start|>", "<think>"


def tiny(*, special: tuple[str, ...] = (START, END, THINK), plain: tuple[str, ...] = ()) -> Any:
    """Return a byte-level BPE tokenizer trained on a few lines."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(list(plain))
    return tokenizer


def sentencepiece_like(*, strips: bool = True) -> Any:
    """Return a tokenizer as Llama 2 and Gemma have: word marks, and bytes for the rest."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strips:
        steps.append(decoders.Strip(" ", 1, 0))
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += ["▁", "h", "e", "l", "o", "he", "ll", "hell", "hello", "▁hello"]
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("▁", "hello")]
    tokenizer = Tokenizer(
        models.BPE(
            {name: index for index, name in enumerate(names)},
            merges,
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
    ])  # fmt: skip
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def with_bos(tokenizer: Any, bos: str, *, eos: str = "") -> Any:
    from tokenizers.processors import TemplateProcessing

    names = [name for name in (bos, eos) if name]
    tokenizer.post_processor = TemplateProcessing(
        single=" ".join([bos, "$A", eos]).strip(),
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in names],
    )
    return tokenizer


def saved(folder: Path, tokenizer: Any, **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def opened(folder: Path, tokenizer: Any, **files: Any) -> HfTokenizer:
    return HfTokenizer(saved(folder, tokenizer, **files))


def text_of(tokenizer: HfTokenizer, ids: list[int]) -> str:
    return b"".join(tokenizer.token_bytes(token_id) for token_id in ids).decode()


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_pieces_join_to_the_text(tmp_path: Path, text: str) -> None:
    tokenizer = opened(tmp_path, tiny(plain=(" indent", "é")))
    ids = tokenizer.encode(text, add_bos=False, parse_special=True)
    assert text_of(tokenizer, ids) == text


def test_every_byte_has_a_piece(tmp_path: Path) -> None:
    tokenizer = opened(tmp_path, tiny())
    pieces = {tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocabulary_size)}
    assert {bytes((byte,)) for byte in range(256)} <= pieces


def test_added_text_stands_for_itself(tmp_path: Path) -> None:
    # In the byte alphabet this character is the byte 0xE9 alone.
    tokenizer = opened(tmp_path, tiny(plain=("<é>", "    ")))
    for text in ("<é>", "    "):
        (token_id,) = tokenizer.encode(text, add_bos=False, parse_special=True)
        assert tokenizer.token_bytes(token_id) == text.encode()


@pytest.mark.parametrize("text", [text for text in TEXTS if "▁" not in text])
@pytest.mark.parametrize("strips", [True, False])
def test_sentencepiece_pieces_keep_the_leading_space(
    tmp_path: Path, text: str, strips: bool
) -> None:
    tokenizer = opened(tmp_path, sentencepiece_like(strips=strips))
    ids = tokenizer.encode(text, add_bos=False, parse_special=True)
    assert text_of(tokenizer, ids) == f" {text}"


def test_byte_tokens_are_one_byte(tmp_path: Path) -> None:
    tokenizer = opened(tmp_path, sentencepiece_like())
    pieces = [tokenizer.token_bytes(3 + byte) for byte in range(256)]
    assert pieces == [bytes((byte,)) for byte in range(256)]


def test_metaspace_pieces(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = {"<unk>": 0, "▁the": 1, "▁sea": 2, "<0x41>": 3}
    tokenizer = Tokenizer(models.Unigram([(word, -1.0) for word in words], 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    read = opened(tmp_path, tokenizer)
    # Without a fallback to bytes such an entry is text.
    assert [read.token_bytes(i) for i in (1, 2, 3)] == [b" the", b" sea", b"<0x41>"]
    tokenizer.decoder = None
    assert opened(tmp_path, tokenizer).token_bytes(1) == b" the"


def test_word_pieces_and_word_ends(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "sea": 1, "##side": 2}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece("##")
    read = opened(tmp_path, tokenizer)
    assert [read.token_bytes(i) for i in (1, 2)] == [b" sea", b"side"]
    tokenizer.decoder = decoders.BPEDecoder("ea")
    assert opened(tmp_path, tokenizer).token_bytes(1) == b"s "


def test_control_tokens_are_silent_unless_shown(tmp_path: Path) -> None:
    tokenizer = opened(tmp_path, tiny(plain=("<tool_call>",)))
    text = f"{START}a{THINK}b<tool_call>c{END}"
    ids = tokenizer.encode(text, add_bos=False, parse_special=True)
    assert text_of(tokenizer, ids) == "ab<tool_call>c"
    assert b"".join(tokenizer.piece(i, special=True) for i in ids).decode() == text
    tokenizer.show(b"<think>", b"</think>")
    assert text_of(tokenizer, ids) == "a<think>b<tool_call>c"


def test_special_tokens_are_text_where_they_are_not_parsed(tmp_path: Path) -> None:
    tokenizer = opened(tmp_path, tiny())
    ids = tokenizer.encode(f"a{END}", add_bos=False, parse_special=False)
    assert text_of(tokenizer, ids) == f"a{END}"
    assert not any(tokenizer.is_end(token_id) for token_id in ids)
    parsed = tokenizer.encode(f"a{END}", add_bos=False, parse_special=True)
    assert tokenizer.is_end(parsed[-1])


def test_both_ways_of_encoding_run_at_once(tmp_path: Path) -> None:
    tokenizer = opened(tmp_path, tiny())
    text = f"hello {END} world " * 20
    answers: dict[bool, set[tuple[int, ...]]] = {True: set(), False: set()}

    def encode(parse_special: bool) -> None:
        for _ in range(50):
            ids = tokenizer.encode(text, add_bos=False, parse_special=parse_special)
            answers[parse_special].add(tuple(ids))

    threads = [threading.Thread(target=encode, args=(index % 2 == 0,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers[True]) == len(answers[False]) == 1
    assert answers[True] != answers[False]


def test_ids_outside_the_vocabulary_are_empty(tmp_path: Path) -> None:
    tokenizer = opened(tmp_path, tiny())
    for token_id in (-1, tokenizer.vocabulary_size, 10**12):
        assert tokenizer.token_bytes(token_id) == b""
        assert not tokenizer.is_end(token_id)


def test_bos_comes_before_and_nothing_behind(tmp_path: Path) -> None:
    tokenizer = opened(tmp_path, with_bos(tiny(), START, eos=END), tokenizer_config={
        "bos_token": START, "eos_token": {"content": END},
    })  # fmt: skip
    bare = tokenizer.encode("hello", add_bos=False, parse_special=True)
    assert tokenizer.adds_bos
    assert (tokenizer.bos_text, tokenizer.eos_text) == (START, END)
    assert tokenizer.encode("hello", add_bos=True, parse_special=True) == [0, *bare]
    assert tokenizer.encode_for_embedding("hello") == [0, *bare, 1]


@pytest.mark.parametrize(
    ("has_template", "add_bos_token", "expected"),
    [
        (False, None, False), (False, True, True), (False, False, False),
        (True, None, True), (True, True, True), (True, False, False),
    ],
)  # fmt: skip
def test_an_explicit_add_bos_token_decides(
    tmp_path: Path, has_template: bool, add_bos_token: bool | None, expected: bool
) -> None:
    tokenizer = with_bos(tiny(), START) if has_template else tiny()
    config = {"bos_token": START, "add_bos_token": add_bos_token}
    read = opened(tmp_path, tokenizer, tokenizer_config=config)
    assert read.adds_bos is expected
    assert (read.encode("a", add_bos=True, parse_special=True)[0] == 0) is expected


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    tokenizer = tiny()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    read = opened(tmp_path, tokenizer)
    ids = read.encode("hello sea and world", add_bos=False, parse_special=True)
    assert text_of(read, ids) == "hello sea and world"


def test_ends_come_from_everywhere(tmp_path: Path) -> None:
    names = ("<a>", "<b>", "<c>", "<d>", "<reponame>", "<|other|>")
    read = opened(
        tmp_path,
        tiny(special=names),
        config={"eos_token_id": 0},
        generation_config={"eos_token_id": [1, 2, 10**6, "x", -1, True]},
        tokenizer_config={"eos_token": "<d>"},
    )
    assert read.end_ids == {0, 1, 2, 3, 4}


def test_ends_of_other_descriptions_are_added_and_bound_by_grammars(tmp_path: Path) -> None:
    read = opened(tmp_path, tiny())
    before, size = read.end_ids, read.vocabulary_size
    added = next(each for each in range(size) if each not in before)
    read.add_ends([added, size, -1])
    assert read.end_ids == before | {added}
    assert read.is_end(added)
    assert added in read._read_vocabulary().ends


def test_a_messages_end_is_not_the_answers(tmp_path: Path) -> None:
    alone = opened(tmp_path / "a", tiny(special=("<|end|>",)))
    assert alone.is_end(0)
    harmony = opened(tmp_path / "b", tiny(special=("<|end|>", "<|return|>", "<|call|>")))
    assert harmony.end_ids == {1, 2}


def test_bos_may_be_named_by_other_files(tmp_path: Path) -> None:
    mapped = {"bos_token": {"content": START}, "eos_token": END}
    read = opened(tmp_path / "a", tiny(), special_tokens_map=mapped)
    assert (read.bos_text, read.eos_text) == (START, END)
    config = {"model_type": "llama", "bos_token_id": 0, "eos_token_id": [1]}
    read = opened(tmp_path / "b", tiny(), config=config)
    assert (read.bos_text, read.eos_text) == (START, END)
    denied = opened(tmp_path / "c", tiny(), config=config, tokenizer_config={"bos_token": None})
    assert denied.bos_text == ""


def test_tokens_of_the_configuration_alone_are_added(tmp_path: Path) -> None:
    tokenizer = tiny()
    size = tokenizer.get_vocab_size()
    listed = {
        str(size): {"content": "<|extra|>", "special": True},
        str(size + 1): {"content": "<more>", "special": False},
        str(size + 9): {"content": "<gap>"},
    }
    read = opened(tmp_path, tokenizer, tokenizer_config={"added_tokens_decoder": listed})
    ids = read.encode("<|extra|><more>", add_bos=False, parse_special=True)
    assert ids == [size, size + 1]
    assert text_of(read, ids) == "<more>"


def test_half_a_surrogate_is_refused(tmp_path: Path) -> None:
    tokenizer = opened(tmp_path, tiny())
    for parse_special in (True, False):
        with pytest.raises(RequestError, match="Unicode"):
            tokenizer.encode("a\ud800", add_bos=False, parse_special=parse_special)


def test_a_mask_allows_only_what_fits(tmp_path: Path) -> None:
    read = opened(tmp_path, tiny(), tokenizer_config={"eos_token": END})
    mask = read.mask(output_constraint(JsonOutput({"const": "sea"})))
    # Models pad their output beyond the vocabulary.
    text = b""
    for _ in range(10):
        logits = np.zeros(read.vocabulary_size + 5, np.float32)
        mask.apply(logits)
        allowed = np.flatnonzero(np.isfinite(logits))
        assert allowed.max() < read.vocabulary_size
        if read.is_end(int(allowed[0])):
            break
        text += read.token_bytes(int(allowed[0]))
        mask.accept(int(allowed[0]))
    assert text == b'"sea"'


def test_a_mask_of_byte_tokens(tmp_path: Path) -> None:
    read = opened(tmp_path, sentencepiece_like(), tokenizer_config={"eos_token": "</s>"})
    mask = read.mask(output_constraint(JsonOutput({"const": "ß"})))
    logits = np.zeros(read.vocabulary_size, np.float32)
    mask.apply(logits)
    allowed = np.flatnonzero(np.isfinite(logits))
    assert {read.token_bytes(int(i)) for i in allowed} == {b'"'}


def test_a_vocabulary_without_bytes_has_no_masks(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "sea": 1}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    read = opened(tmp_path, tokenizer)
    with pytest.raises(UnsupportedParameter, match="response_format"):
        read.mask(output_constraint(JsonOutput()))


def test_a_folder_without_a_tokenizer_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(BrokenModel, match=r"needs tokenizer\.json, or tokenizer\.model"):
        HfTokenizer(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[]", '{"model": null}', "null", '{"model":' * 9999, '{"version": "1.0"}', "\x00"],
)
def test_damaged_tokenizers_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(BrokenModel, match=r"tokenizer\.json"):
        HfTokenizer(tmp_path)


def test_an_empty_vocabulary_and_a_missing_unknown_are_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    for model in (models.WordLevel({}, "x"), models.WordLevel({"b": 0}, "missing")):
        with pytest.raises(BrokenModel):
            opened(tmp_path, Tokenizer(model))


def test_a_token_id_beyond_reason_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    # The library would write a line for every id up to the last.
    text = Tokenizer(models.WordLevel({"[UNK]": 0, "far": 7}, "[UNK]")).to_str()
    (tmp_path / "tokenizer.json").write_text(text.replace('"far":7', '"far":2147483648'))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BrokenModel, match="2147483649 token ids"):
        HfTokenizer(tmp_path)


def test_vocab_and_merges_are_converted(tmp_path: Path) -> None:
    source = tiny(special=("<|endoftext|>",))
    source.model.save(str(tmp_path))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    read = HfTokenizer(tmp_path)
    for text in TEXTS[:4]:
        ids = read.encode(text, add_bos=False, parse_special=True)
        assert text_of(read, ids) == text
    assert read.is_end(source.token_to_id("<|endoftext|>"))


def test_a_sentencepiece_model_is_converted(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    text = tmp_path / "corpus.txt"
    text.write_text("\n".join(["hello world this is a text", "the sea is blue and wide"] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    config = {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
        "add_bos_token": True,
    }  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    read = HfTokenizer(tmp_path)
    ids = read.encode("hello süd 🎈", add_bos=True, parse_special=True)
    assert ids[0] == 1
    assert text_of(read, ids) == " hello süd 🎈"
    assert read.end_ids == {2}


def test_code_in_the_folder_is_never_run(tmp_path: Path) -> None:
    tiny().model.save(str(tmp_path))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    model = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    (tmp_path / "config.json").write_text(json.dumps(model))
    with pytest.raises(BrokenModel, match="cannot convert the tokenizer"):
        HfTokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()
    assert "evil" not in sys.modules


def test_the_starters_tokenizer_agrees_with_llama_cpp(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from backends.gguf.model import GgufModel
    from tests.starter import starter_path

    native = GgufModel(starter_path())
    try:
        size = native.vocabulary_size
        names = [native.piece(index, special=True) for index in range(size)]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        chars = {byte: char for char, byte in byte_alphabet().items()}
        assert alphabet_of(chars) == set(alphabet)
        first_text = names.index(b"!")
        special = [name.decode() for name in names[:first_text]]
        words = ["".join(chars[byte] for byte in name) for name in names[first_text:]]
        vocabulary = {word: index for index, word in enumerate([*special, *words])}
        tokenizer = Tokenizer(models.BPE(vocabulary, []))
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(special)
        read = opened(tmp_path, tokenizer, tokenizer_config={"eos_token": END})
        assert [read.piece(index, special=True) for index in range(size)] == names
        assert [read.token_bytes(i) for i in range(size)] == [
            native.token_bytes(i) for i in range(size)
        ]
        assert read.end_ids == {index for index in range(size) if native.is_end(index)}
    finally:
        native.close()


def alphabet_of(chars: dict[int, str]) -> set[str]:
    """Return the characters that stand for all 256 bytes."""
    return {chars[byte] for byte in range(256)}


def test_a_pattern_that_gives_up_on_a_text_refuses_the_request(tmp_path: Path) -> None:
    from tokenizers import Regex, pre_tokenizers

    source = tiny()
    # Exponential: the library panics when its limit of retries is reached.
    source.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex("(a|aa)+$"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer = HfTokenizer(saved(tmp_path, source))
    with pytest.raises(RequestError, match="gave up"):
        tokenizer.encode("a" * 60 + "b", add_bos=True, parse_special=True)
    assert tokenizer.encode("fine", add_bos=False, parse_special=True)


def test_encoding_a_long_text_lets_other_threads_run(tmp_path: Path) -> None:
    tokenizer = HfTokenizer(saved(tmp_path, tiny()))
    turns = 0
    is_over = threading.Event()

    def count() -> None:
        nonlocal turns
        while not is_over.wait(0.001):
            turns += 1

    thread = threading.Thread(target=count)
    thread.start()
    before = turns
    tokenizer.encode("a" * 2_000_000, add_bos=True, parse_special=True)
    after = turns
    is_over.set()
    thread.join()
    # A call that keeps the GIL allows a few.
    assert after - before > 30


@pytest.mark.parametrize("make", [tiny, sentencepiece_like])
def test_a_text_that_cannot_fit_is_bounded_from_below(tmp_path: Path, make: Any) -> None:
    tokenizer = HfTokenizer(saved(tmp_path, make()))
    assert tokenizer.fewest_tokens("the sea is blue " * 30, 100) == 0
    for text in ("a" * 100_000, "hello " * 50_000, "中" * 50_000, "\u1112\u1161\u11ab" * 50_000):
        bound = tokenizer.fewest_tokens(text, 100)
        assert 100 < bound <= len(tokenizer.encode(text, add_bos=False, parse_special=True))


def test_a_library_that_panics_at_loading_is_a_broken_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Panic(BaseException):
        """Stands for pyo3_runtime.PanicException."""

    def panic(_: str) -> None:
        raise Panic("called unwrap on a None value")

    import tokenizers

    folder = saved(tmp_path, tiny())
    monkeypatch.setattr(tokenizers, "Tokenizer", type("Tokenizer", (), {"from_str": panic}))
    with pytest.raises(BrokenModel, match="unwrap"):
        HfTokenizer(folder)
