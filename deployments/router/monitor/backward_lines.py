"""Reads the lines of a growing, rotated log file from its end, in blocks."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

_BLOCK = 32 * 1024
_LONGEST_LINE = 256 * 1024
_MOST_ROTATED = 10


class ReadBudget:
    """How many bytes may still be read."""

    def __init__(self, most_bytes: int) -> None:
        self._left = most_bytes

    def take(self, count: int) -> None:
        """Count bytes.  Raises BudgetSpent once there were too many."""
        if self._left <= 0:
            raise BudgetSpent
        self._left -= count


class BudgetSpent(Exception):
    """More would have to be read than a request may."""


def backward_lines(
    path: Path, budget: ReadBudget, is_wanted: Callable[[bytes], bool | None] | None = None
) -> Iterator[tuple[int, bytes]]:
    """Yield offset and text of each line, the last one first, then those of rotated files.

    A line that is still being written is left out, longer ones than 256 KiB as well.  `is_wanted`
    tells whether the wanted lines go on after a line, None: it does not tell; the end of a large
    file is then skipped by bisection.  Files that vanish or cannot be read end without an error.
    Raises BudgetSpent.
    """
    seen = set[tuple[int, int]]()
    with ExitStack() as stack:
        for number in range(_MOST_ROTATED + 1):
            name = path if not number else path.with_name(f"{path.name}.{number}")
            try:
                file = stack.enter_context(name.open("rb"))
                state = os.fstat(file.fileno())
                if (state.st_dev, state.st_ino) in seen:
                    # It was rotated after it was opened.
                    continue
                seen.add((state.st_dev, state.st_ino))
                end = _wanted_end(file, state.st_size, is_wanted) if is_wanted else state.st_size
                yield from _lines_of(file, end, budget)
            except OSError:
                return


def _wanted_end(file: BinaryIO, size: int, is_wanted: Callable[[bytes], bool | None]) -> int:
    """Return an offset after which no line is wanted, by bisection down to two blocks."""
    low, high = 0, size
    while high - low > 2 * _BLOCK:
        middle = (low + high) // 2
        file.seek(middle)
        block = file.read(_BLOCK)
        offset = block.find(b"\n") + 1
        verdict = None
        while verdict is None and (line_end := block.find(b"\n", offset)) > 0:
            verdict = is_wanted(block[offset:line_end])
            if verdict is None:
                offset = line_end + 1
        found = middle + offset
        if verdict is None or found >= high:
            break
        low, high = (found, high) if verdict else (low, found)
    return high


def _lines_of(file: BinaryIO, end: int, budget: ReadBudget) -> Iterator[tuple[int, bytes]]:
    """Yield the complete lines before `end`, backwards."""
    rest, position, is_overlong = b"", end, False
    is_first = True
    while position > 0:
        size = min(_BLOCK, position)
        budget.take(size)
        position -= size
        file.seek(position)
        text = file.read(size) + rest
        first, *lines = text.split(b"\n")
        offset = position + len(text)
        for line in reversed(lines):
            offset -= len(line)
            # What follows the last line feed is not complete.
            if not is_first and not is_overlong and line:
                yield offset, line
            is_first, is_overlong = False, False
            offset -= 1
        rest = first
        if len(rest) > _LONGEST_LINE:
            rest, is_overlong = b"", True
    if rest and not is_first and not is_overlong:
        yield 0, rest
