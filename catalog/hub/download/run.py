"""Runs downloads in child processes: disk preflight, progress with speed and stalls, clean-up.

Cancelling the task pauses a download: what has arrived is kept, and the next run goes on with it.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from catalog.hub.download.claim import is_claimed_by
from catalog.hub.download.job import DownloadJob, lock_path, partial_file
from catalog.hub.download.speed import SpeedWindow
from catalog.hub.download.transfer import HEADROOM_BYTES
from catalog.jobs import JobInterrupted
from core.child import AnswerTooLong, AsyncChild, ChildEnded, describe_exit, kept_environment
from core.errors import ImpetusError, InsufficientDisk, RequestError, error_of
from core.files import lock_file
from core.units import format_bytes

_CODE_FOLDER = Path(__file__).resolve().parents[3]
_KEPT_VARIABLES = (
    *("PATH", "HOME", "LANG", "LC_ALL", "VIRTUAL_ENV", "HF_ENDPOINT"),
    # Either means offline mode to huggingface_hub.
    *("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "http_proxy", "https_proxy", "all_proxy", "no_proxy"),
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
)
_TICK_S = 1.0


@dataclass(frozen=True, slots=True)
class DownloadProgress:
    """How far a download is; `speed` in bytes a second, 0 while nothing arrives.

    `remaining_s` is None while it is unknown; `stalled_s` counts from the last byte.  `reason` says
    why the download waits for another try, empty while it does not.
    """

    done_bytes: int
    total_bytes: int
    speed: float
    remaining_s: float | None
    stalled_s: float
    reason: str = ""


OnProgress = Callable[[DownloadProgress], None]


def arrived_bytes(job: DownloadJob) -> int:
    """Return how many bytes of a download are on the disk already."""
    found = 0
    for file in job.files:
        for candidate in (job.work / file.path, partial_file(job.work, file.path)):
            with contextlib.suppress(OSError):
                found += min(candidate.stat().st_size, file.size_bytes)
                break
    return found


def require_space(job: DownloadJob, beside: Sequence[DownloadJob] = ()) -> None:
    """Raise InsufficientDisk with the numbers if the disk has no room for what is missing.

    `beside` are the other downloads that run, onto the same disk.
    """
    missing = job.size_bytes - arrived_bytes(job)
    others = sum(max(each.size_bytes - arrived_bytes(each), 0) for each in beside)
    needed = missing + others + HEADROOM_BYTES
    folder = next(each for each in job.target.parents if each.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        also = f", {format_bytes(others)} for downloads that run" if others else ""
        raise InsufficientDisk(
            f"The download of {job.repository} needs {format_bytes(missing)}{also} and leaves "
            f"{format_bytes(HEADROOM_BYTES)} free, but {format_bytes(free)} are free in {folder}. "
            f"Free {format_bytes(needed - free)}, or choose a smaller model."
        )


def discard(job: DownloadJob) -> None:
    """Remove what has arrived of a download that is not to go on.

    What another download into the same folder has brought stays, and what one is writing now.
    """
    if is_claimed_by(job) and not _is_running(job.work):
        shutil.rmtree(job.work, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class PartialDownload:
    """What has arrived of a download that is not finished; `changed_s` in Unix seconds."""

    work: Path
    size_bytes: int
    changed_s: float


def partial_downloads(folder: Path) -> tuple[PartialDownload, ...]:
    """Return the unfinished downloads beside the models in `folder`, without running ones."""
    found = []
    for work in sorted(folder.glob(".*.download")):
        if work.is_dir() and not work.is_symlink() and not _is_running(work):
            files = [path.stat() for path in work.rglob("*") if path.is_file()]
            newest = max((each.st_mtime for each in files), default=work.stat().st_mtime)
            found.append(PartialDownload(work, sum(each.st_size for each in files), newest))
    return tuple(found)


def discard_partial(partial: PartialDownload) -> bool:
    """Remove what has arrived of an unfinished download; False if it runs or is gone."""
    if _is_running(partial.work) or not partial.work.is_dir():
        return False
    shutil.rmtree(partial.work, ignore_errors=True)
    return True


def _is_running(work: Path) -> bool:
    """Whether a process holds the lock of an unfinished download."""
    try:
        with lock_path(work).open("r") as lock:
            lock_file(lock, 0.0)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


async def run_download(
    job: DownloadJob,
    token: str,
    on_progress: OnProgress,
    *,
    limit: Callable[[], int] | None = None,
    beside: Sequence[DownloadJob] = (),
    tick_s: float = _TICK_S,
) -> Path:
    """Download a model and return its folder, `job.target`; `on_progress` is told every second.

    `limit` is asked as often for the bytes in a second from then on, instead of the job's.
    `beside` are the other downloads that run, which need room on the same disk.
    Raises RequestError for a target that exists, InsufficientDisk, ChecksumFailed, the errors
    `Hub…`, and JobInterrupted for a process that died.  `token` goes to the child's stdin alone.
    """
    job.check()
    if os.path.lexists(job.target):
        raise RequestError(
            f"{job.target.name!r} exists already; choose another name.", param="target"
        )
    await asyncio.to_thread(require_space, job, beside)
    follower = _Follower(job, on_progress)
    child = AsyncChild(
        [sys.executable, "-P", "-m", "catalog.hub.download.child"],
        _environment(),
        _CODE_FOLDER,
    )
    try:
        with contextlib.suppress(ChildEnded):
            await child.write(f"{job.to_json()}\n{token}\n".encode())
        with _ticking(_Ticker(child, follower, job.limit_bytes_per_s, limit), tick_s):
            async for line in child.lines():
                follower.read(line)
        code = await child.wait()
    except AnswerTooLong:
        raise ImpetusError(
            f"The download of {job.repository} was stopped: its process sent a line over 64 KiB, "
            "which is a bug. Please report it."
        ) from None
    finally:
        await asyncio.shield(child.close())
    if follower.error is not None:
        raise follower.error
    if not follower.is_done:
        hint = ", perhaps because memory ran out" if code == -signal.SIGKILL else ""
        raise JobInterrupted(
            f"The download of {job.repository} {describe_exit(code)}{hint}. Resume it: what has "
            f"arrived is kept. {child.stderr_tail}".strip()
        )
    return job.target


class _Follower:
    """Turns the child's lines into progress."""

    def __init__(self, job: DownloadJob, on_progress: OnProgress) -> None:
        self._on_progress = on_progress
        self._total_bytes = job.size_bytes
        self._speed = SpeedWindow(job.size_bytes, time.monotonic())
        self._done_bytes = self._found_bytes = 0
        self._reason = ""
        self.is_done = False
        self.error: ImpetusError | None = None

    def read(self, line: bytes) -> None:
        """Take one line of the child."""
        try:
            message: dict[str, Any] = json.loads(line)
        except ValueError:
            return
        if "error" in message:
            text, again = str(message.get("message", "")), message.get("retry_after_s")
            self.error = error_of(message["error"], text, again)
        self.is_done = self.is_done or bool(message.get("done"))
        self._reason = str(message.get("reason", ""))
        self._done_bytes = int(message.get("done_bytes", self._done_bytes))
        self._found_bytes = int(message.get("found_bytes", self._found_bytes))
        self._speed.add(self._done_bytes, time.monotonic(), self._found_bytes)
        self.report()

    def report(self) -> None:
        """Tell the progress as of now."""
        now = time.monotonic()
        self._on_progress(
            DownloadProgress(
                self._done_bytes,
                self._total_bytes,
                self._speed.speed(now),
                self._speed.remaining_s(now),
                self._speed.stalled_s(now),
                self._reason,
            )
        )


@dataclass(slots=True)
class _Ticker:
    """Reports, so that a stall is told that sends no line, and passes other limits on."""

    child: AsyncChild
    follower: _Follower
    sent: int
    limit: Callable[[], int] | None

    def tick(self) -> None:
        """Do both; a limit that the child does not take now is sent at the next call."""
        self.follower.report()
        if self.limit is None or (wanted := self.limit()) == self.sent:
            return
        with contextlib.suppress(ChildEnded):
            if self.child.send(b"%d\n" % wanted):
                self.sent = wanted


@contextlib.contextmanager
def _ticking(ticker: _Ticker, tick_s: float) -> Iterator[None]:
    """Call the ticker at intervals while the block runs."""
    loop = asyncio.get_running_loop()
    timers: list[asyncio.TimerHandle] = []

    def tick() -> None:
        ticker.tick()
        timers[:] = [loop.call_later(tick_s, tick)]

    timers.append(loop.call_later(tick_s, tick))
    try:
        yield
    finally:
        timers[0].cancel()


def _environment() -> dict[str, str]:
    """Return the child's environment: proxies and certificates, but no token."""
    return kept_environment(*_KEPT_VARIABLES) | {
        "PYTHONPATH": str(_CODE_FOLDER),
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONWARNINGS": "ignore",
    }
