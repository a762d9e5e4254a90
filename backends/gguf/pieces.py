"""Cuts text into pieces on which llama.cpp's tokenizers neither crash nor take quadratic time."""

import re
from collections.abc import Collection, Iterator

from backends.cancellation import check_cancelled

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
_SPECIALS_AT_ONCE = 500
_HEAD_CHARACTERS = 4


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


def cut_before_unknown(text: str, unknown: str, behind: Collection[str] = ()) -> Iterator[str]:
    """Yield pieces of `text` with about 4,096 of the `unknown` characters; they begin with one.

    llama.cpp's SentencePiece tokenizer takes time with the square of their number.  They are part
    of no token, so nothing is merged over them, and a cut there changes no tokens; except after a
    special token, whose last character is one of `behind`.
    """
    start = count = 0
    for found in re.finditer(f"[{re.escape(unknown)}]", text) if unknown else ():
        count += 1
        at = found.start()
        if count > _UNKNOWN_AT_ONCE and text[at - 1] not in behind:
            yield text[start:at]
            start, count = at, 1
    yield text[start:]


class Specials:
    """Finds special tokens in text.  Some vocabularies have thousands, so none is searched for."""

    def __init__(self, texts: Collection[str]) -> None:
        self._texts = frozenset(texts)
        self._lengths = sorted({len(each) for each in texts}, reverse=True)
        self._starts = "".join({each[0] for each in texts})
        self._heads = _head_pattern(self._texts)
        self.ends = frozenset(each[-1] for each in texts)

    def are_many(self, text: str) -> bool:
        """Whether `text` may have so many that it must be cut."""
        return sum(map(text.count, self._starts)) > _SPECIALS_AT_ONCE

    def find_ends(self, text: str) -> Iterator[int]:
        """Yield where each special token in `text` ends; the longest one at a place counts.

        Raises Cancelled.
        """
        after = 0
        for found in self._heads.finditer(text):
            check_cancelled()
            at = found.start()
            # At the end of the text, what is cut out may be shorter than the length.
            parts = (text[at : at + length] for length in self._lengths)
            ends = (at + len(part) for part in parts if part in self._texts)
            if at >= after and (end := next(ends, None)) is not None:
                after = end
                yield end


def _head_pattern(texts: Collection[str]) -> re.Pattern[str]:
    """Return a pattern of the places where one of `texts` may start: four characters are looked at.

    One of the first character alone would find nearly every place of a text of only `<`.
    """
    starts = re.escape("".join(sorted({each[0] for each in texts})))
    rests = "|".join(map(re.escape, sorted({each[1:_HEAD_CHARACTERS] for each in texts})))
    return re.compile(f"[{starts}](?={rests})" if starts else "(?!)")


def cut_after_specials(text: str, specials: Specials) -> Iterator[str]:
    """Yield pieces of `text` with about 500 special tokens; all but the last end with one.

    llama.cpp looks for special tokens in time that grows with the square of their number.  Text is
    cut before no blank, which a special token may take with it.
    """
    start = count = 0
    for end in specials.find_ends(text) if specials.are_many(text) else ():
        count += 1
        if count >= _SPECIALS_AT_ONCE and not text[end : end + 1].isspace():
            yield text[start:end]
            start, count = end, 0
    if start < len(text) or not text:
        yield text[start:]
