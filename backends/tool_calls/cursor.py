"""An answer's text as it arrives, for readers that are written as if it were all there."""

from collections.abc import Generator
from typing import TypeAlias, TypeVar

Result = TypeVar("Result")

Steps: TypeAlias = Generator[None, None, Result]


class Malformed(Exception):
    """The text is no call in the family's form; `pending` was read already and is still text."""

    def __init__(self, pending: str = "") -> None:
        super().__init__(pending)
        self.pending = pending


class Unfinished(Malformed):
    """The text ended within a call."""


class Cursor:
    """A place in a growing text.

    The methods that return `Steps` are generators: they yield where they need more text, and
    what they return does not depend on how the text was cut.
    """

    __slots__ = ("_at", "_mark", "_text", "is_ended")

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._mark = 0
        self.is_ended = False

    def feed(self, text: str) -> None:
        """Take the next text."""
        self._text = self._text[self._mark :] + text
        self._at -= self._mark
        self._mark = 0

    @property
    def rest(self) -> str:
        """What is here and not yet read."""
        return self._text[self._at :]

    @property
    def since_mark(self) -> str:
        """What was read since `mark`."""
        return self._text[self._mark : self._at]

    def mark(self, back: int = 0) -> None:
        """Keep what is read from here on, or from `back` characters before."""
        self._mark = self._at - back

    def advance(self, count: int) -> None:
        """Count so many characters as read."""
        self._at += count

    def unread(self, text: str) -> None:
        """Put `text` before what is not yet read."""
        self._text = text + self._text[self._at :]
        self._at = self._mark = 0

    def more(self) -> Steps[bool]:
        """Wait for more text; return False when there is none."""
        known = len(self._text) - self._at
        while len(self._text) - self._at == known:
            if self.is_ended:
                return False
            yield
        return True

    def spaces(self) -> Steps[None]:
        """Skip spaces and line breaks."""
        while True:
            rest = self.rest
            kept = rest.lstrip()
            self.advance(len(rest) - len(kept))
            if kept or not (yield from self.more()):
                return

    def accept(self, *literals: str) -> Steps[str]:
        """Skip the one of `literals` that comes next and return it, or return nothing."""
        while True:
            rest = self.rest
            may_come = any(one != rest and one.startswith(rest) for one in literals)
            if may_come and (yield from self.more()):
                continue
            found = max((one for one in literals if rest.startswith(one)), key=len, default="")
            self.advance(len(found))
            return found

    def expect(self, *literals: str) -> Steps[str]:
        """Skip the one of `literals` that comes next and return it.  Raises Malformed."""
        found = yield from self.accept(*literals)
        if not found:
            raise Malformed
        return found

    def until(self, *enders: str, most: int) -> Steps[tuple[str, str]]:
        """Return the text before the first of `enders`, and that one; both are read then.

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
        """Whether a longer ender than the one at `at` may still come there."""
        tail = rest[at:]
        return not self.is_ended and any(one != tail and one.startswith(tail) for one in enders)


def held_length(text: str, markers: tuple[str, ...]) -> int:
    """Return how much of the end of `text` may be the beginning of one of `markers`."""
    longest = max(map(len, markers), default=0)
    for length in range(min(longest - 1, len(text)), 0, -1):
        suffix = text[-length:]
        if any(len(one) > length and one.startswith(suffix) for one in markers):
            return length
    return 0
