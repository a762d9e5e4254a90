"""Follows a job of the server to its end: a bar on a terminal, else a line now and then."""

import time
from collections.abc import Mapping
from typing import Any, Protocol, Self

from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from core.text import escaped
from scripts.models_lib import words
from scripts.models_lib.problems import StillRunning
from scripts.models_lib.screen import Screen
from scripts.server_lib.client import ServerClient, ServerRefused, ServerUnreachable, path_of

_POLL_S = 0.5
# How long a server that stopped answering, perhaps for a restart, is asked again.
_SILENCE_LIMIT_S = 20.0
_LINE_EVERY_S = 30.0
# Narrower terminals have no room for a bar beside the numbers.
_LEAST_BAR_WIDTH = 90
_RESTING = frozenset({*words.ENDED, "paused"})


class View(Protocol):
    """Shows how far a job is."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *problem: object) -> None: ...

    def show(self, job: Mapping[str, Any], problem: str = "") -> None:
        """Show a job, and why nothing newer is known of it."""
        ...


class Bar:
    """One line of a terminal that is drawn again and again."""

    def __init__(self, screen: Screen, title: str) -> None:
        console = screen.errors
        numbers = TextColumn("{task.percentage:>3.0f}%", markup=False)
        pace = Column(ratio=2, no_wrap=True, overflow="ellipsis")
        columns = [
            TextColumn("{task.description}", markup=False, table_column=_ellipsis()),
            *([BarColumn(20)] if console.width >= _LEAST_BAR_WIDTH else []),
            numbers,
            TextColumn("{task.fields[pace]}", markup=False, table_column=pace),
        ]
        self._progress = Progress(*columns, console=console, transient=True, expand=True)
        self._task: TaskID = self._progress.add_task(escaped(title), total=None, pace="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *problem: object) -> None:
        self._progress.stop()

    def show(self, job: Mapping[str, Any], problem: str = "") -> None:
        """Draw the bar."""
        total = job["total_bytes"] or None
        amount, pace = words.amount(job), problem or words.pace(job)
        self._progress.update(
            self._task,
            total=total,
            completed=job["done_bytes"],
            pace=escaped(f"{amount}, {pace}" if amount else pace),
        )


def _ellipsis() -> Column:
    return Column(ratio=1, no_wrap=True, overflow="ellipsis")


class Lines:
    """A line when the state changes, and else every half a minute; nothing with `--json`."""

    def __init__(self, screen: Screen, title: str) -> None:
        self._screen = screen
        self._title = title
        self._last_state = ("", "", "")
        self._last_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *problem: object) -> None:
        pass

    def show(self, job: Mapping[str, Any], problem: str = "") -> None:
        """Print a line if it is time for one."""
        now = time.monotonic()
        state = (job["state"], job["reason"], problem)
        if self._screen.is_json or (
            state == self._last_state and now - self._last_at < _LINE_EVERY_S
        ):
            return
        self._last_state, self._last_at = state, now
        parts = (words.amount(job), problem or words.pace(job))
        self._screen.note(f"{self._title}: {', '.join(part for part in parts if part)}")


def open_view(screen: Screen, title: str) -> View:
    """Return what shows progress on this screen."""
    return Bar(screen, title) if screen.is_animated else Lines(screen, title)


def follow(client: ServerClient, screen: Screen, job: Mapping[str, Any]) -> Mapping[str, Any]:
    """Show a job until it is over or paused; return it then.

    Raises ServerUnreachable once the server has been silent for 20 s, ServerRefused, and
    StillRunning after Ctrl-C.
    """
    try:
        return _follow(client, screen, job)
    except KeyboardInterrupt:
        raise StillRunning(
            f"{job['title']} goes on in the server. The first of these follows it, as the same "
            "command does; the other one gives it up:\n"
            f"  scripts/models jobs follow {job['id']}\n  scripts/models jobs cancel {job['id']}"
        ) from None


def _follow(client: ServerClient, screen: Screen, job: Mapping[str, Any]) -> Mapping[str, Any]:
    silent_since: float | None = None
    with open_view(screen, job["title"]) as view:
        while True:
            if silent_since is None:
                view.show(job)
                if job["state"] in _RESTING:
                    return job
            _pause()
            try:
                job = client.get(path_of("jobs", job["id"]), is_patient=False)
                silent_since = None
            except (ServerUnreachable, ServerRefused) as problem:
                silent_since = time.monotonic() if silent_since is None else silent_since
                _check_silence(problem, time.monotonic() - silent_since)
                view.show(job, "waiting for the server to answer")


def _pause() -> None:
    time.sleep(_POLL_S)


def _check_silence(problem: ServerUnreachable | ServerRefused, silence_s: float) -> None:
    """Raise what is no passing silence, or one that lasts too long."""
    if isinstance(problem, ServerRefused) and problem.status != 503:
        raise problem
    if silence_s >= _SILENCE_LIMIT_S:
        raise ServerUnreachable(
            f"{problem} What has arrived is kept, and the server goes on with it when it runs "
            "again; run the same command again to follow it."
        ) from problem
