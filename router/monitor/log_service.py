"""Lines of the server's log as the API shows them, and the Protocol that the routes need."""

from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from router.job_service import Answer

Level: TypeAlias = Literal["debug", "info", "warning", "error", "critical"]
LEVELS: tuple[Level, ...] = ("debug", "info", "warning", "error", "critical")


class LogLine(Answer):
    """One line of the log; `id` orders lines and is what `before` takes.

    `at` is in Unix seconds.  `component` is a part of the server: router, scheduler, jobs, a
    format, or a part of Ray Serve.  `request_id` is that of the `x-request-id` header, or one of
    Ray Serve's, empty for others.  `exception` is a traceback.  `fields` are further ones by name.
    """

    id: str
    at: float
    level: Level
    component: str
    message: str
    process: int | None
    place: str
    request_id: str
    exception: str
    fields: dict[str, str]


class LogPage(Answer):
    """Lines, oldest first; `before` gets those before them, null: there are none.

    `is_partial`: too much of the log matches nothing; the search goes on with `before`.
    """

    lines: tuple[LogLine, ...]
    before: str | None
    is_partial: bool


@dataclass(frozen=True, slots=True)
class LogFilter:
    """Which lines; empty texts mean all.  `text` is found in any case in all that is shown."""

    level: Level = "debug"
    component: str = ""
    request_id: str = ""
    text: str = ""

    def accepts(self, line: LogLine) -> bool:
        """Return whether a line is meant."""
        if LEVELS.index(line.level) < LEVELS.index(self.level):
            return False
        if self.component and line.component != self.component:
            return False
        # Messages of other processes name the request that they are about.
        if self.request_id not in (line.request_id, "") and self.request_id not in line.message:
            return False
        shown = (line.message, line.exception, line.place, *line.fields.values())
        return not self.text or any(self.text.casefold() in one.casefold() for one in shown)


class Logs(Protocol):
    """The server's log."""

    async def last_lines(self, wanted: LogFilter, limit: int, before: str) -> LogPage:
        """Return the last lines before an id, all with an empty one; reads a bounded part.

        Raises RequestError for a `before` that is no id, Unavailable if there is no log.
        """
        ...
