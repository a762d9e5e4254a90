"""The log of one run: bounded in size; the log of a run that crashed is kept beside it."""

from pathlib import Path
from typing import BinaryIO

from core.units import MIB

_LIMIT_BYTES = 16 * MIB
_KEPT_BYTES = 4 * MIB
_SHOWN_LINES = 15
_SHOWN_BYTES = 64 * 1024
_END = b"impetus: stopped in order\n"
_CUT = b"impetus: earlier lines were removed\n"


class LogFile:
    """`serve.log` of this run; `serve.log.1` is that of the last run that did not end in order."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self) -> BinaryIO:
        """Return the new, empty log for appending.  Raises OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_file() and not self._end().endswith(_END):
            self.path.replace(self.path.with_name(f"{self.path.name}.1"))
        self.path.write_bytes(b"")
        return self.path.open("ab")

    def close_in_order(self) -> None:
        """Record that the run ended as it should; a failure to write is ignored."""
        try:
            with self.path.open("ab") as file:
                file.write(_END)
        except OSError:
            return

    def bound(self) -> None:
        """Remove the beginning of a log that has grown too large, in place.

        Its writers append, so they go on at the new end.  Lines written meanwhile may be lost.
        """
        try:
            if self.path.stat().st_size <= _LIMIT_BYTES:
                return
            with self.path.open("rb+") as file:
                file.seek(-_KEPT_BYTES, 2)
                kept = file.read(_KEPT_BYTES)
                file.seek(0)
                file.write(_CUT + kept.partition(b"\n")[2])
                file.truncate()
        except OSError:
            return

    def text(self) -> str:
        """Return the log's text; empty if it cannot be read."""
        try:
            return self.path.read_text(errors="replace")
        except OSError:
            return ""

    def last_lines(self) -> list[str]:
        """Return the last lines, for a message."""
        return self._end().decode(errors="replace").splitlines()[-_SHOWN_LINES:]

    def _end(self) -> bytes:
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(max(0, size - _SHOWN_BYTES))
                return file.read()
        except OSError:
            return b""
