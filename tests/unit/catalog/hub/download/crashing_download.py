"""A process that downloads in children of its own and lets them crash where a line says.

Reads lines of JSON: a job, and where its download shall crash.  `after` is a number of new bytes;
`at` is a step: `flushed` (a file's content), `renamed` (a file), `recorded`, `cleaned`,
`published` (the folder was renamed), `done` (and its parent flushed).  Answers each with a line:
the exit code of that child, negative for a signal.  Run as `python -m`, from the root.
"""

import functools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from catalog.hub.download import child, transfer
from catalog.hub.download.job import DownloadJob


def die(*_: object) -> None:
    """End as a kill from outside does: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def dying(function: Callable[..., Any], is_it: Callable[..., bool]) -> Callable[..., Any]:
    """Return a function that does its work, then dies if `is_it` says so of its arguments."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        value = function(*args, **options)
        if is_it(*args):
            die()
        return value

    return call


def crash_at(step: str, job: DownloadJob) -> None:
    """Let this process die after a step."""
    places: dict[str, tuple[Any, str, Callable[..., bool]]] = {
        "flushed": (transfer, "flush_to_disk", lambda *_: True),
        "renamed": (Path, "replace", lambda path, _: path.suffix == ".part"),
        "recorded": (child, "write_atomically", lambda *_: True),
        "cleaned": (shutil, "rmtree", lambda *_: True),
        "published": (Path, "rename", lambda *_: True),
        "done": (child, "flush_path", lambda path: path == job.target.parent),
    }
    owner, name, is_it = places[step]
    setattr(owner, name, dying(getattr(owner, name), is_it))


class Counter:
    """Counts new bytes, and dies after some."""

    def __init__(self, after: int) -> None:
        self.left = after
        self.done_bytes = 0

    def add(self, count: int) -> None:
        self.done_bytes += count

    def read(self, count: int) -> None:
        self.left -= count
        if self.left <= 0:
            die()

    fetch = wait = send = staticmethod(lambda *_: None)


def run(order: dict[str, Any]) -> None:
    """Download in this process until it crashes."""
    job = DownloadJob.from_json(json.dumps(order["job"]))
    counter = Counter(order.get("after", 1 << 60))
    append = transfer._Partial.append

    def appended(partial: Any, piece: bytes) -> None:
        append(partial, piece)
        counter.read(len(piece))

    setattr(transfer._Partial, "append", appended)  # noqa: B010
    if "at" in order:
        crash_at(order["at"], job)
    reporter: Any = counter
    child.download(job, "", reporter, transfer.Pace())


def main() -> None:
    """Fork for each line: the modules are imported once."""
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                run(json.loads(line))
            except BaseException as problem:
                sys.stderr.write(f"{problem!r}\n")
                os._exit(1)
            os._exit(0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
