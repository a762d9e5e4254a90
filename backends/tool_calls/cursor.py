"""Cursor over streamed text, for parsers written as generators that wait for more input."""

from collections.abc import Generator
from typing import TypeAlias, TypeVar

Result = TypeVar("Result")

Steps: TypeAlias = Generator[None, None, Result]


class Malformed(Exception):
    """The text is not a call in the family's form; `pending` was read but belongs to the text."""

    def __init__(self, pending: str = "") -> None:
        super().__init__(pending)
        self.pending = pending


class Unfinished(Malformed):
    """The text ended within a call."""


class Cursor:
    """A read position in a growing text.

    Methods that return `Steps` are generators: they yield when they need more text, and their
    result does not depend on how the text was split.
    """

    __slots__ = ("_at", "_mark", "_text", "is_ended")

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._mark = 0
        self.is_ended = False

    def feed(self, text: str) -> None:
        """Append the next text."""
        self._text = self._text[self._mark :] + text
        self._at -= self._mark
        self._mark = 0

    @property
    def rest(self) -> str:
        """The available text that is not read yet."""
        return self._text[self._at :]

    @property
    def since_mark(self) -> str:
        """The text read since `mark`."""
        return self._text[self._mark : self._at]

    def mark(self, back: int = 0) -> None:
        """Keep the text from here on, or from `back` characters before."""
        self._mark = self._at - back

    def advance(self, count: int) -> None:
        """Move `count` characters ahead."""
        self._at += count

    def unread(self, text: str) -> None:
        """Insert `text` before the unread text."""
        self._text = text + self._text[self._at :]
        self._at = self._mark = 0

    def more(self) -> Steps[bool]:
        """Wait for more text; return False at the end of the text."""
        known = len(self._text) - self._at
        while len(self._text) - self._at == known:
            if self.is_ended:
                return False
            yield
        return True

    def spaces(self) -> Steps[None]:
        """Skip whitespace."""
        while True:
            rest = self.rest
            kept = rest.lstrip()
            self.advance(len(rest) - len(kept))
            if kept or not (yield from self.more()):
                return

    def accept(self, *literals: str) -> Steps[str]:
        """Skip and return the longest of `literals` that comes next, or an empty string."""
        while True:
            rest = self.rest
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
        """Read the text up to the first of `enders`; return that text and the ender.

        Raises Malformed if none comes within `most` characters, Unfinished at the text's end.
        """
        while True:
            rest = self.rest
            found = [(at, -len(one), one) for one in enders if (at := rest.find(one)) >= 0]
            ender = min(found)[2] if found else ""
            if found and not self._may_be_longer(rest, min(found)[0], enders):
                text = rest[: min(found)[0]]
                if len(text) > most:
                    raise Malformed
                self.advance(len(text) + len(ender))
                return text, ender
            if len(rest) > most:
                raise Malformed
            if not (yield from self.more()):
                self.advance(len(rest))
                raise Unfinished

    def _may_be_longer(self, rest: str, at: int, enders: tuple[str, ...]) -> bool:
        """Whether more text could turn the ender at `at` into a longer one."""
        tail = rest[at:]
        return not self.is_ended and any(one != tail and one.startswith(tail) for one in enders)


def partial_marker_length(text: str, markers: tuple[str, ...]) -> int:
    """Return how many characters at the end of `text` may start one of `markers`."""
    longest = max(map(len, markers), default=0)
    for length in range(min(longest - 1, len(text)), 0, -1):
        suffix = text[-length:]
        if any(len(one) > length and one.startswith(suffix) for one in markers):
            return length
    return 0
