"""Converts tokenizers between GGUF and Hugging Face, and checks that both give the same tokens.

GGUF names the pre-tokenizer (`tokenizer.ggml.pre`), Hugging Face has its regular expressions.  A
wrong one silently changes a few tokens in a thousand, so every conversion compares the two.
Source of the patterns: llama.cpp `llama-vocab.cpp`, llm_tokenizer_bpe.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from core.errors import BrokenModel, UnsupportedCapability
from core.native_exit import hold, let_go

if TYPE_CHECKING:
    from backends.hf.tokenizer import HfTokenizer

# (text, whether to add the tokens before a prompt) to token ids.
Encode: TypeAlias = Callable[[str, bool], list[int]]

_MAX_SPECIALS = 64
_DIGIT = r"\p{N}"
_GPT2 = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)  # fmt: skip
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s|"
    r"%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

PATTERNS: Mapping[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "smollm": (_DIGIT, _GPT2),
    "llama-bpe": (_HEAD + r"\p{N}{1,3}" + _TAIL,),
    "qwen2": (_HEAD + _DIGIT + _TAIL,),
    "tekken": (_CASED % ("", "", _DIGIT),),
    "gpt-4o": (_CASED % (_CONTRACTION, _CONTRACTION, r"\p{N}{1,3}"),),
}
_ALIASES = {
    "default": "gpt-2", "phi-2": "gpt-2", "roberta-bpe": "gpt-2", "olmo": "gpt-2",
    "starcoder": "smollm", "refact": "smollm", "command-r": "smollm", "exaone": "smollm",
    "codeshell": "smollm", "minerva-7b": "smollm",
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "falcon3": "llama-bpe", "lfm2": "llama-bpe",
    "deepseek-r1-qwen": "qwen2", "stablelm2": "qwen2", "megrez": "qwen2", "hunyuan": "qwen2",
    "llama4": "gpt-4o",
}  # fmt: skip

# Where tokenizers differ: digits, blanks, case, contractions, scripts, emoji, code, markup.
PROBES = (
    "Hello world", " leading and  double   triple    blanks ", "tab\there\t\tand\n\n\nlines \n x",
    "\r\nwindows\r\nlines\r\n", "price 1234.50 USD on 2026-11-22, 0.5% of 1,000,000", "x=10**12",
    "version 3.14159 and 0xDEADBEEF 1e-9", "don't I'LL we've HE'S o'clock 'quoted' it's",
    "camelCase PascalCase snake_case SCREAMING_CASE kebab-case iPhone15Pro",
    "日本語テスト 한국어 中文字符", "Привет мир, как дела? Ελληνικά עברית العربية हिन्दी ไทย",
    "grüße naïve façade Ærøskøbing ŁÓDŹ", "emoji 😀👍🏽 ok 👨‍👩‍👧‍👦 🇩🇪🎉🎈", "१२३ ½ Ⅷ ² ①",
    "def f(a: int, *b) -> dict[str, list[int]]:\n    return {'k': [a, *b]}\n\n\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] * 2; } // done\n",
    "if x != y && !(z || w) { std::cout << \"hi\\n\"; }", "SELECT * FROM t WHERE a<>'b';--",
    "<div class=\"a b\">&amp; text</div>", "https://example.org/a/b?c=d&e=%20f#g",
    "a\u00a0b\u3000c",
    "...!!!???---___***###", "( [ { < > } ] )", "\\alpha + \\beta = \\frac{1}{2}",
    "zero\u200bwidth",
    "The end.\n", "\n", " ", "  ", "    four\n        eight", "a", "é", "ﬁ ligature ™ © €",
    "…—“”‘’",
)  # fmt: skip


def patterns_for(pre: str) -> tuple[str, ...] | None:
    """Return the patterns of a `tokenizer.ggml.pre`, in order of use; None if it is unknown."""
    return PATTERNS.get(_ALIASES.get(pre, pre))


def pre_tokenizer(patterns: tuple[str, ...]) -> Any:
    """Return a `tokenizers` pre-tokenizer that applies the patterns, then encodes bytes."""
    from tokenizers import Regex, pre_tokenizers

    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, byte_level])


def pre_name(described: Mapping[str, Any] | None) -> str:
    """Return the `tokenizer.ggml.pre` for a tokenizer.json's `pre_tokenizer`.

    Raises UnsupportedCapability if its patterns are not in `PATTERNS`.
    """
    found = tuple(_patterns_in(described or {}))
    for name, patterns in PATTERNS.items():
        if found == patterns:
            return name
    raise UnsupportedCapability(
        "The tokenizer's pre-tokenizer has no known equivalent in GGUF.", param="target_format"
    )


def _patterns_in(described: Mapping[str, Any]) -> Iterator[str]:
    match described.get("type"):
        case "Sequence":
            for part in described.get("pretokenizers", ()):
                yield from _patterns_in(part)
        case "Digits" if described.get("individual_digits"):
            yield _DIGIT
        case "Split":
            pattern = described.get("pattern", {})
            yield str(pattern.get("Regex", pattern.get("String", "")))
        case "ByteLevel":
            if described.get("use_regex", True):
                yield _GPT2
        case other:
            yield f"<{other}>"


class GgufVocabulary:
    """The tokenizer of a GGUF file, without the weights, run by llama.cpp."""

    def __init__(self, path: Path) -> None:
        """Load the vocabulary; blocks for a fraction of a second.  Raises BrokenModel."""
        from backends.gguf.model import library, native_log

        self._llama = library()
        params = self._llama.llama_model_default_params()
        params.vocab_only = True
        self._model = self._llama.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            reason = native_log.take_errors() or "llama.cpp gave no reason"
            raise BrokenModel(
                f"The vocabulary of {path.name} cannot be loaded: {reason}", param="model"
            )
        hold(self._model)
        self._vocabulary = self._llama.llama_model_get_vocab(self._model)

    def encode(self, text: str, *, with_special: bool) -> list[int]:
        """Return the token ids; special tokens in the text are recognized."""
        data = text.encode()
        room = len(data) + 8
        buffer = (self._llama.llama_token * room)()
        count = self._llama.llama_tokenize(
            self._vocabulary, data, len(data), buffer, room, with_special, True
        )
        return list(buffer[: max(count, 0)])

    def special(self, name: str) -> tuple[int, str] | None:
        """Return id and text of the `bos` or `eos` token if the file says to add it, else None."""
        if not getattr(self._llama, f"llama_vocab_get_add_{name}")(self._vocabulary):
            return None
        token_id = int(getattr(self._llama, f"llama_vocab_{name}")(self._vocabulary))
        if token_id < 0:
            return None
        return token_id, self._llama.llama_vocab_get_text(self._vocabulary, token_id).decode()

    def end_ids(self) -> tuple[int, ...]:
        """Return the ids of all tokens that end a generation in llama.cpp, in order."""
        count = self._llama.llama_vocab_n_tokens(self._vocabulary)
        is_end = self._llama.llama_vocab_is_eog
        return tuple(each for each in range(count) if is_end(self._vocabulary, each))

    def close(self) -> None:
        """Free the vocabulary; may be called twice."""
        if self._model:
            self._llama.llama_model_free(self._model)
            let_go(self._model)
            self._model = None


@contextmanager
def gguf_vocabulary(path: Path) -> Iterator[GgufVocabulary]:
    """Open the tokenizer of a GGUF file, and close it at the end.  Raises BrokenModel."""
    vocabulary = GgufVocabulary(path)
    try:
        yield vocabulary
    finally:
        vocabulary.close()


def tokenizer_differences(
    encode: Encode, specials: Sequence[str], vocabulary: GgufVocabulary
) -> list[str]:
    """Return the probes for which `encode` and llama.cpp give other tokens."""
    probes = [*PROBES, *(f"before{text} after\n{text}" for text in specials[:_MAX_SPECIALS])]
    return [
        probe
        for probe in probes
        for with_special in (False, True)
        if encode(probe, with_special) != vocabulary.encode(probe, with_special=with_special)
    ]


def use_llama_blanks(tokenizer: Any, *, has_prefix: bool) -> None:
    """Make a SentencePiece tokenizer treat blanks as llama.cpp does.

    With `has_prefix` a blank comes before every text and every text after a special token, also
    before one that begins with a blank (Source: llama.cpp `llama-vocab.cpp`, llm_tokenizer_spm).
    """
    from tokenizers import normalizers

    blanks = [normalizers.Replace(" ", "▁")]
    prefix = [normalizers.Prepend("▁")] if has_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, *blanks])
    tokenizer.pre_tokenizer = None


def match_gguf_tokenizer(tokenizer: Any, vocabulary: GgufVocabulary, pre: str) -> None:
    """Give a tokenizer the pre-tokenizer and the bos and eos tokens of its GGUF file.

    `pre` is the file's pre-tokenizer, empty for SentencePiece, which has none: see
    `use_llama_blanks`.  Raises UnsupportedCapability if its tokens still differ from llama.cpp's.
    """
    from tokenizers import processors

    patterns = patterns_for(pre)
    if patterns is not None and type(tokenizer.model).__name__ == "BPE" and pre:
        tokenizer.pre_tokenizer = pre_tokenizer(patterns)
    bos, eos = vocabulary.special("bos"), vocabulary.special("eos")
    frame = [f"{bos[1]}:0" if bos else "", "$A:0", f"{eos[1]}:0" if eos else ""]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[part for part in frame if part],
        pair=[part for part in (*frame, "$B:0") if part],
        special_tokens=[(text, token_id) for token_id, text in filter(None, (bos, eos))],
    )
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    different = tokenizer_differences(
        lambda text, with_special: tokenizer.encode(text, add_special_tokens=with_special).ids,
        added,
        vocabulary,
    )
    if different:
        raise UnsupportedCapability(
            f"The tokenizer ({pre or 'unnamed'}) cannot be converted exactly: "
            f"{len(different)} of {2 * len(PROBES)} test texts give other tokens, the first is "
            f"{different[0]!r}.",
            param="target_format",
        )


def check_same_tokens(tokenizer: "HfTokenizer", specials: Sequence[str], gguf: Path) -> None:
    """Check that the GGUF file written from a tokenizer gives the same tokens and end tokens.

    Raises UnsupportedCapability if it does not.
    """

    def encode(text: str, with_special: bool) -> list[int]:
        return tokenizer.encode(text, add_bos=with_special, parse_special=True)

    with gguf_vocabulary(gguf) as vocabulary:
        different = tokenizer_differences(encode, specials, vocabulary)
        lost = sorted(tokenizer.end_ids - set(vocabulary.end_ids()))
    if different:
        raise UnsupportedCapability(
            f"The tokenizer cannot be converted exactly: llama.cpp gives other tokens for "
            f"{len(different)} of {2 * len(PROBES)} test texts, the first is {different[0]!r}.",
            param="target_format",
        )
    if lost:
        raise UnsupportedCapability(
            f"The tokenizer cannot be converted exactly: its token {lost[0]} ends an answer, but "
            "not in llama.cpp.",
            param="target_format",
        )
