"""Reads the last lines of all log files of a Ray Serve session, merged by time."""

import asyncio
import heapq
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from core.errors import RequestError, Unavailable
from deployments.router.monitor.backward_lines import BudgetSpent, ReadBudget, backward_lines
from deployments.router.monitor.log_lines import LineId, parsed_lines, time_of
from router.monitor.log_service import LogFilter, LogLine, LogPage

MOST_BYTES = 4 * 1024 * 1024
# Each process that is replaced leaves a file; the oldest are left out.
_MOST_FILES = 40


class LogFiles:
    """Implements `router.monitor.log_service.Logs` over the files of this machine's processes."""

    def __init__(self, folder: Callable[[], Path | None], *, most_bytes: int = MOST_BYTES) -> None:
        """`folder` returns where the files are, None: nowhere.

        About `most_bytes` are read for each call.
        """
        self._folder = folder
        self._most_bytes = most_bytes
        # One reader at a time: parsing shares the interpreter with the answers being streamed.
        self._turn = asyncio.Lock()

    async def last_lines(self, wanted: LogFilter, limit: int, before: str) -> LogPage:
        """Return the last lines, read on a thread; other calls wait meanwhile."""
        end = None
        if before:
            try:
                end = LineId.parse(before)
            except ValueError:
                raise RequestError(
                    "before: must be the id of a line, or what an answer gave as before.",
                    param="before",
                ) from None
        folder = self._folder()
        if folder is None:
            raise Unavailable("This process writes no log file.")
        async with self._turn:
            return await asyncio.to_thread(self._read, folder, wanted, limit, end)

    def _read(self, folder: Path, wanted: LogFilter, limit: int, end: LineId | None) -> LogPage:
        budget = ReadBudget(self._most_bytes)
        files = [self._lines(path, budget, end) for path in _log_files(folder)]
        found: list[tuple[LineId, LogLine]] = []
        seen = end
        is_partial = has_more = False
        try:
            for line_id, line in heapq.merge(*files, key=_id_of, reverse=True):
                if end is not None and line_id >= end:
                    continue
                if len(found) == limit:
                    has_more = True
                    break
                seen = line_id
                if wanted.accepts(line):
                    found.append((line_id, line))
        except BudgetSpent:
            is_partial = has_more = True
        found.sort(key=_id_of)
        return LogPage(
            lines=tuple(line for _, line in found),
            before=str(seen) if has_more and seen is not None else None,
            is_partial=is_partial,
        )

    @staticmethod
    def _lines(
        path: Path, budget: ReadBudget, end: LineId | None
    ) -> Iterator[tuple[LineId, LogLine]]:
        def is_earlier(line: bytes) -> bool | None:
            written = time_of(line)
            return None if written is None or end is None else written <= end.time_ns

        lines = backward_lines(path, budget, is_earlier if end is not None else None)
        return parsed_lines(lines, path.name.partition("_")[0])


def _id_of(pair: tuple[LineId, LogLine]) -> LineId:
    return pair[0]


def _log_files(folder: Path) -> list[Path]:
    """Return the files that were written to last."""
    times: list[tuple[float, Path]] = []
    with suppress(OSError):
        for path in folder.glob("*.log"):
            with suppress(OSError):
                times.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(times, reverse=True)[:_MOST_FILES]]
