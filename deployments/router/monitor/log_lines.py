"""Parses lines of Ray Serve's logs: JSON of our processes, text of its controller."""

import json
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from router.monitor.log_service import LEVELS, Level, LogLine

_TEXT = re.compile(
    rb"(DEBUG|INFO|WARNING|ERROR|CRITICAL) (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3}) "
    rb"(\S+) (.*?)-- (.*)"
)
# Of JSON lines: what has a place of its own, and what only Ray knows.
_KNOWN = frozenset(
    ("asctime", "levelname", "message", "filename", "lineno", "process", "exc_text", "request_id")
) | frozenset(("timestamp_ns", "deployment", "component_name"))
_OF_RAY = frozenset(
    ("worker_id", "node_id", "actor_id", "actor_name", "job_id", "task_id", "task_name")
) | frozenset(("task_func_name", "log_to_stderr", "replica", "application", "component_id"))
_APPLICATION = "impetus_"
_MOST_FIELDS = 20
_LONGEST_FIELD = 500
_LONGEST_MESSAGE = 8000
_MOST_FOLLOWING = 200
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@dataclass(frozen=True, order=True, slots=True)
class LineId:
    """Orders lines of all files: by time, in nanoseconds since 1970, and by place in a file."""

    time_ns: int
    offset: int

    @classmethod
    def parse(cls, text: str) -> "LineId":
        """Return the id with this text.  Raises ValueError."""
        if not re.fullmatch(r"[0-9]{1,20}-[0-9]{1,20}", text):
            raise ValueError(text)
        first, _, second = text.partition("-")
        return cls(int(first), int(second))

    def __str__(self) -> str:
        return f"{self.time_ns}-{self.offset}"


def time_of(line: bytes) -> int | None:
    """Return when a line was written, in nanoseconds since 1970; None for one that continues."""
    parsed = _parse_json(line)
    if parsed is not None:
        return int(parsed["timestamp_ns"])
    match = _TEXT.fullmatch(line)
    return None if match is None else _text_time(match)


def parsed_lines(
    lines: Iterable[tuple[int, bytes]], component: str
) -> Iterator[tuple[LineId, LogLine]]:
    """Yield the lines of one file, last one first; those without a head belong to the one before.

    `component` is that of JSON lines that name none.
    """
    following: list[str] = []
    for offset, text in lines:
        found = _parse(offset, text, component, following)
        if found is not None:
            yield found
            following = []
        elif len(following) < _MOST_FOLLOWING:
            following.append(_shown(text.decode(errors="replace"), _LONGEST_MESSAGE))


def _parse(
    offset: int, text: bytes, component: str, following: list[str]
) -> tuple[LineId, LogLine] | None:
    parsed = _parse_json(text)
    if parsed is not None:
        line_id = LineId(int(parsed["timestamp_ns"]), offset)
        return line_id, _json_line(line_id, parsed, component, following)
    match = _TEXT.fullmatch(text)
    if match is None:
        return None
    level, _, _, name, _, message = (part.decode(errors="replace") for part in match.groups())
    line_id = LineId(_text_time(match), offset)
    return line_id, LogLine(
        id=str(line_id),
        at=line_id.time_ns / 1e9,
        level=_level(level),
        component=_component(name) or component,
        message=_joined(message, following),
        process=None,
        place="",
        request_id="",
        exception="",
        fields={},
    )


def _json_line(
    line_id: LineId, parsed: dict[str, Any], component: str, following: list[str]
) -> LogLine:
    process = parsed.get("process")
    others = [name for name in parsed if name not in _KNOWN and name not in _OF_RAY]
    return LogLine(
        id=str(line_id),
        at=line_id.time_ns / 1e9,
        level=_level(str(parsed.get("levelname", ""))),
        component=_component(str(parsed.get("deployment", ""))) or component,
        message=_joined(str(parsed.get("message", "")), following),
        process=process if isinstance(process, int) else None,
        place=f"{parsed.get('filename', '')}:{parsed.get('lineno', '')}",
        request_id=_shown(str(parsed.get("request_id") or ""), _LONGEST_FIELD),
        exception=_shown(str(parsed.get("exc_text") or ""), _LONGEST_MESSAGE),
        fields={
            name[:_LONGEST_FIELD]: _shown(str(parsed[name]), _LONGEST_FIELD)
            for name in others[:_MOST_FIELDS]
        },
    )


def _parse_json(line: bytes) -> dict[str, Any] | None:
    if not line.startswith(b"{"):
        return None
    try:
        parsed = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(parsed, dict) or not isinstance(parsed.get("timestamp_ns"), int):
        return None
    return parsed


def _text_time(match: re.Match[bytes]) -> int:
    """Return the time of a text line, which is local, in nanoseconds since 1970."""
    whole = time.mktime(time.strptime(match[2].decode(), "%Y-%m-%d %H:%M:%S"))
    return int(whole) * 10**9 + int(match[3]) * 10**6


def _component(name: str) -> str:
    return _shown(name.removeprefix(_APPLICATION), _LONGEST_FIELD)


def _level(name: str) -> Level:
    return next((one for one in LEVELS if one == name.lower()), "info")


def _joined(message: str, following: list[str]) -> str:
    return _shown("\n".join((message, *reversed(following))), _LONGEST_MESSAGE)


def _shown(text: str, most: int) -> str:
    """Return text without escape sequences, cut to a length."""
    text = _ESCAPES.sub("", text)
    return text if len(text) <= most else f"{text[:most]} … ({len(text)} characters)"
