"""Cuts text into pieces on which llama.cpp's tokenizers neither crash nor take quadratic time."""

import re
from collections.abc import Iterator

# Measured with 77 pre-tokenizers: std::regex of libstdc++ takes up to 321 bytes of stack for each
# character of a match; that of libc++ takes none.
STACK_BYTES_PER_CHARACTER = 1024
PIECE_CHARACTERS = 128 * 1024
# Matches of these pre-tokenizers span the spaces between words, or every blank.
_JOINS_WORDS = frozenset(["exaone-moe", "gemma4", "sarvam-moe", "superbpe"])
_JOINS_LINES = frozenset(["superbpe"])
# Runs that are cut, and into what length: for two pre-tokenizers the time of a regex grows with the
# square of a run (digits are grouped in threes); "whitespace" aborts at two blanks in a row.
_CUT_RUNS = {
    "deepseek-llm": (re.compile(r"\s{121,}"), 120),
    "superbpe": (re.compile(r"\d{121,}"), 120),
    "whitespace": (re.compile(r"\s{2,}"), 1),
}
ABORTS_AT_BLANKS = frozenset(["whitespace"])
_UNKNOWN_AT_ONCE = 4096


def text_pieces(text: str, pre_tokenizer: str) -> Iterator[str]:
    """Yield pieces of at most `PIECE_CHARACTERS`, whose tokens together are those of `text`.

    Text is cut before a blank between two letters, where every pre-tokenizer begins a new word.
    Only text without one in 64 Ki characters is cut anywhere, so that its tokens may differ there.
    """
    blanks = "" if pre_tokenizer in _JOINS_LINES else "\n"
    if pre_tokenizer not in _JOINS_WORDS:
        blanks += " "
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end = start + PIECE_CHARACTERS
        cut = max((_last_cut(text, blank, start, end) for blank in blanks), default=-1)
        cut = cut if cut > start else end
        yield from _short_runs(text[start:cut], pre_tokenizer)
        start = cut
    yield from _short_runs(text[start:], pre_tokenizer)


def _last_cut(text: str, blank: str, start: int, end: int) -> int:
    """Return the last place in the second half where `blank` stands between letters, or -1."""
    least = (start + end) // 2
    at = text.rfind(blank, least, end)
    while at >= 0 and not (_is_letter(text[at - 1]) and _is_letter(text[at + 1 : at + 2])):
        at = text.rfind(blank, least, at)
    return at


def _is_letter(character: str) -> bool:
    return character.isascii() and character.isalpha()


def _short_runs(text: str, pre_tokenizer: str) -> Iterator[str]:
    """Yield `text` in pieces without the runs that the pre-tokenizer cannot take."""
    if pre_tokenizer not in _CUT_RUNS:
        yield text
        return
    pattern, length = _CUT_RUNS[pre_tokenizer]
    start = 0
    for run in pattern.finditer(text):
        # From the end: digits are grouped in threes from there.
        first = run.start() + (run.end() - run.start()) % length
        for cut in range(first, run.end(), length):
            if cut > start:
                yield text[start:cut]
                start = cut
    yield text[start:]


def cut_before_unknown(text: str, unknown: str) -> Iterator[str]:
    """Yield pieces of `text` with about 4,096 of the `unknown` characters; they begin with one.

    llama.cpp's SentencePiece tokenizer takes time with the square of their number.  They are part
    of no token, so nothing is merged over them, and a cut there changes no tokens.
    """
    start = count = 0
    for found in re.finditer(f"[{re.escape(unknown)}]", text) if unknown else ():
        count += 1
        if count > _UNKNOWN_AT_ONCE:
            yield text[start : found.start()]
            start, count = found.start(), 1
    yield text[start:]
