"""What a command prints: results on standard output, everything else on standard error."""

import getpass
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from core.text import escaped
from scripts.models_lib.table import Column, print_table

_LONGEST_TEXT = 4000


class Screen:
    """Prints for a person, or with `is_json` one JSON document and nothing else on stdout.

    Colours and animation are only for terminals; NO_COLOR and TERM=dumb are obeyed.
    """

    def __init__(self, *, is_json: bool) -> None:
        self.is_json = is_json
        self._out = _console(is_error=False)
        self.errors = _console(is_error=True)

    @property
    def is_animated(self) -> bool:
        """Whether progress may be drawn: both outputs are terminals that can move the cursor."""
        ends = (self._out, self.errors)
        is_able = all(end.is_terminal and not end.is_dumb_terminal for end in ends)
        return is_able and not self.is_json

    def say(self, text: str) -> None:
        """Print lines of the result; one that begins with spaces is never wrapped, for copying."""
        self._print(self._out, text)

    def text(self, text: str) -> None:
        """Print a text of several lines as it is, without control characters."""
        for line in text.splitlines():
            shown = Text(escaped(line.expandtabs(4), _LONGEST_TEXT))
            self._out.print(shown, soft_wrap=not self._out.is_terminal)

    def note(self, text: str) -> None:
        """Print lines that are not part of the result, as `say` does."""
        self._print(self.errors, text)

    def table(self, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
        """Print a table of the result."""
        shown = [[escaped(text, _LONGEST_TEXT) for text in row] for row in rows]
        print_table(self._out, columns, shown, is_wide=not self._out.is_terminal)

    def document(self, content: Mapping[str, Any]) -> None:
        """Print the result as JSON."""
        sys.stdout.write(f"{json.dumps(content, ensure_ascii=False)}\n")
        sys.stdout.flush()

    @staticmethod
    def can_ask() -> bool:
        """Whether a person is there to answer."""
        return sys.stdin.isatty() and sys.stderr.isatty()

    def confirms(self, question: str) -> bool:
        """Whether a person answers a question with yes."""
        self.errors.print(Text(f"{escaped(question, _LONGEST_TEXT)} [y/N] "), end="")
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    def secret(self, question: str) -> str:
        """Return what a person types unseen, or the first line of standard input."""
        if self.can_ask():
            return getpass.getpass(question).strip()
        return sys.stdin.readline().strip()

    def _print(self, console: Console, text: str) -> None:
        for line in text.split("\n"):
            is_whole = not console.is_terminal or line.startswith("  ")
            console.print(Text(escaped(line, _LONGEST_TEXT)), soft_wrap=is_whole)


def _console(*, is_error: bool) -> Console:
    # What GitHub's and other programs set to force colours into files does not count here.
    stream = sys.stderr if is_error else sys.stdout
    return Console(
        file=stream,
        force_terminal=stream.isatty(),
        highlight=False,
        markup=False,
        emoji=False,
    )
