"""Cursor over streamed text, for parsers written as generators that wait for more input."""

import re
from collections.abc import Generator
from functools import lru_cache
from typing import TypeAlias, TypeVar

Result = TypeVar("Result")

Steps: TypeAlias = Generator[None, None, Result]

_SPACES = re.compile(r"\s*")


class Malformed(Exception):
    """The text is not a call in the family's form; `pending` was read but belongs to the text.

    `pending` is the end of the text that was read.
    """

    def __init__(self, pending: str = "") -> None:
        super().__init__(pending)
        self.pending = pending


class Unfinished(Malformed):
    """The text ended within a call."""


class Cursor:
    """A read position in a growing text.

    Methods that return `Steps` are generators: they yield when they need more text, and their
    result does not depend on how the text was split.  Reading takes linear time: no method copies
    or searches the same text again, except up to the length that `until` waits for.
    """

    __slots__ = ("_at", "_found", "_mark", "_past", "_text", "is_ended")

    def __init__(self) -> None:
        # `_past` is the text from the mark up to `_text`, which is read up to `_at`.
        self._past: list[str] = []
        self._text = ""
        self._at = 0
        self._mark = 0
        # Per needle: where a search in `_text` began, and what it found.
        self._found: dict[str, tuple[int, int]] = {}
        self.is_ended = False

    def feed(self, text: str) -> None:
        """Append the next text."""
        if self._mark < self._at:
            self._past.append(self._text[self._mark : self._at])
        self._text = self._text[self._at :] + text
        self._at = self._mark = 0
        self._found.clear()

    @property
    def window(self) -> tuple[str, int]:
        """The available text and the read position in it."""
        return self._text, self._at

    @property
    def available(self) -> int:
        """The number of characters that can be read now."""
        return len(self._text) - self._at

    def peek(self, count: int) -> str:
        """Return up to `count` of the next characters."""
        return self._text[self._at : self._at + count]

    @property
    def since_mark(self) -> str:
        """The text read since `mark`."""
        text = self._text[self._mark : self._at]
        return "".join((*self._past, text)) if self._past else text

    def mark(self, back: int = 0) -> None:
        """Keep the text from here on, or from `back` characters of the last read before."""
        self._past.clear()
        self._mark = self._at - back

    def advance(self, count: int) -> None:
        """Move `count` characters ahead."""
        self._at += count

    def take(self, count: int) -> str:
        """Return the next `count` characters and move behind them."""
        self._at += count
        return self._text[self._at - count : self._at]

    def unread(self, text: str) -> None:
        """Move back before `text`, the end of what was read, and mark that place."""
        start = self._at - len(text)
        if start >= 0 and self._text.startswith(text, start):
            self._at = start
        else:
            self._text = text + self._text[self._at :]
            self._at = 0
            self._found.clear()
        self.mark()

    def find(self, *needles: str) -> tuple[int, str]:
        """Return how far ahead the first of `needles` is, and which; (-1, "") if none is there.

        Of several at one place, it is the longest.
        """
        best, needle = -1, ""
        for one in needles:
            at = self._find(one)
            is_better = best < 0 or at < best or (at == best and len(one) > len(needle))
            if at >= 0 and is_better:
                best, needle = at, one
        return (best - self._at, needle) if needle else (-1, "")

    def _find(self, needle: str) -> int:
        began, at = self._found.get(needle, (len(self._text), -1))
        if self._at < began:
            # From `began` on, the result is known.
            earlier = self._text.find(needle, self._at, began + len(needle) - 1)
            at = earlier if earlier >= 0 else at
        elif 0 <= at < self._at:
            at = self._text.find(needle, self._at)
        self._found[needle] = (self._at, at)
        return at

    def partial(self, markers: tuple[str, ...]) -> int:
        """Return how many of the last available characters may start one of `markers`."""
        return _partial_length(self._text, self._at, markers)

    def more(self) -> Steps[bool]:
        """Wait for more text; return False at the end of the text."""
        known = self.available
        while self.available == known:
            if self.is_ended:
                return False
            yield
        return True

    def spaces(self) -> Steps[None]:
        """Skip whitespace."""
        while True:
            found = _SPACES.match(self._text, self._at)
            if found is not None:
                self._at = found.end()
            if self.available or not (yield from self.more()):
                return

    def accept(self, *literals: str) -> Steps[str]:
        """Skip and return the longest of `literals` that comes next, or an empty string."""
        longest = max(map(len, literals), default=0)
        while True:
            rest = self.peek(longest)
            may_come = any(one != rest and one.startswith(rest) for one in literals)
            if may_come and (yield from self.more()):
                continue
            found = max((one for one in literals if rest.startswith(one)), key=len, default="")
            self.advance(len(found))
            return found

    def expect(self, *literals: str) -> Steps[str]:
        """Skip and return the one of `literals` that comes next.  Raises Malformed if none does."""
        found = yield from self.accept(*literals)
        if not found:
            raise Malformed
        return found

    def until(self, *enders: str, most: int) -> Steps[tuple[str, str]]:
        """Read a short text up to the first of `enders`; return that text and the ender.

        Raises Malformed, reading nothing, if none comes within `most` characters, Unfinished at the
        text's end.
        """
        while True:
            ahead, ender = self.find(*enders)
            if ahead > most:
                raise Malformed
            if ender and not self._may_be_longer(ahead, enders):
                text = self.take(ahead)
                self.advance(len(ender))
                return text, ender
            if self.available - self.partial(enders) > most:
                raise Malformed
            if not (yield from self.more()):
                self.advance(self.available)
                raise Unfinished

    def read_until(self, ender: str, *, most: int) -> Steps[tuple[str, bool]]:
        """Read a long text up to `ender`, which is skipped; return it and whether `ender` came.

        It did not come if the text ends before, or within `most` characters, which are then read.
        """
        pieces: list[str] = []
        left = most
        while True:
            ahead, _ = self.find(ender)
            count = ahead if ahead >= 0 else self.available - self.partial((ender,))
            if count > left:
                pieces.append(self.take(left))
                return "".join(pieces), False
            pieces.append(self.take(count))
            left -= count
            if ahead >= 0:
                self.advance(len(ender))
                return "".join(pieces), True
            if not (yield from self.more()):
                pieces.append(self.take(self.available))
                return "".join(pieces), False

    def _may_be_longer(self, ahead: int, enders: tuple[str, ...]) -> bool:
        """Whether more text could turn the ender that is `ahead` into a longer one."""
        if self.is_ended:
            return False
        start = self._at + ahead
        tail = self._text[start : start + max(map(len, enders))]
        return any(one != tail and one.startswith(tail) for one in enders)


@lru_cache(maxsize=256)
def _longest_and_firsts(markers: tuple[str, ...]) -> tuple[int, str]:
    return max(map(len, markers), default=0), "".join({one[:1] for one in markers})


def _partial_length(text: str, start: int, markers: tuple[str, ...]) -> int:
    """Return how many characters at the end of `text`, from `start` on, may start a marker."""
    longest, firsts = _longest_and_firsts(markers)
    for at in range(max(start, len(text) - longest + 1), len(text)):
        if text[at] in firsts:
            tail = text[at:]
            if any(len(one) > len(tail) and one.startswith(tail) for one in markers):
                return len(tail)
    return 0
