"""Child process that downloads a model: `python -m catalog.hub.download.child`.

Reads the job and the token as two lines from stdin, then at any time other limits of bytes in a
second, each a number on a line.  Writes lines of JSON to stdout:
`{"done_bytes": …, "found_bytes": …}` as the model arrives, the second of what did not come by the
network, `{"wait_s": …, "reason": …}` before another try, and at the end `{"done": true}` or
`{"error": code, "message": …, "retry_after_s": …}`.  The process kills itself at the end of stdin,
because its parent has died; what has arrived stays.
"""

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from catalog.hub.client import HubClient, HubLimits
from catalog.hub.download.claim import claim_work
from catalog.hub.download.job import RECORD, DownloadJob, lock_path, partial_folder
from catalog.hub.download.record import record_of, shared_files
from catalog.hub.download.transfer import Pace, Transfer, disk_problem
from catalog.hub.download.url import UrlSource
from core.child import die_with_input, die_with_parent, give_way, take_stdout
from core.errors import ImpetusError, RequestError, Unavailable
from core.files import flush_path, lock_file, write_atomically

_REPORT_S = 0.25
_LOCK_S = 5.0


@dataclass(slots=True)
class _Reporter:
    """Sends what has arrived to the parent, at most four times in a second; for all threads."""

    pipe: IO[str]
    done_bytes: int = 0
    fetched_bytes: int = 0
    _sent_s: float = 0.0
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def add(self, count: int) -> None:
        """Count bytes that arrived, or were thrown away."""
        with self._lock:
            self.done_bytes += count
            now = time.monotonic()
            if now - self._sent_s >= _REPORT_S:
                self._sent_s = now
                self.send(self.amounts())

    def fetch(self, count: int) -> None:
        """Count bytes that arrived by the network; `add` is told of them as well."""
        with self._lock:
            self.fetched_bytes += count

    def amounts(self) -> dict[str, Any]:
        """Return how many bytes are there, and how many of them did not come by the network."""
        return {
            "done_bytes": self.done_bytes,
            "found_bytes": self.done_bytes - self.fetched_bytes,
        }

    def wait(self, seconds: float, reason: str) -> None:
        """Tell why the download waits, and for how long."""
        self.send({**self.amounts(), "wait_s": seconds, "reason": reason})

    def send(self, message: Mapping[str, Any]) -> None:
        """Write one line."""
        with self._lock:
            self.pipe.write(json.dumps(message) + "\n")
            self.pipe.flush()


def download(job: DownloadJob, token: str, reporter: _Reporter, pace: Pace) -> None:
    """Fetch all files and make the folder visible.  Raises every failure as an ImpetusError."""
    try:
        job.check()
        partial_folder(job.work).mkdir(parents=True, exist_ok=True)
        with lock_path(job.work).open("w") as lock:
            _lock(lock, job)
            claim_work(job)
            hashes = _fetch_all(job, token, reporter, pace)
            write_atomically(job.work / RECORD, record_of(job, hashes).encode(), mode=0o644)
            _publish(job)
    except OSError as problem:
        raise disk_problem(problem, job.work, job.size_bytes) from problem


def _source(job: DownloadJob, token: str) -> UrlSource | HubClient:
    limits = HubLimits(silence_s=job.silence_s)
    if job.url:
        return UrlSource(job.url, limits, private_hosts=job.private_hosts)
    return HubClient(job.endpoint, token, limits)


def _fetch_all(job: DownloadJob, token: str, reporter: _Reporter, pace: Pace) -> dict[str, str]:
    """Fetch the files, the largest first, several at the same time; return their hashes.

    The first failure is raised at once; the other threads end with the process.
    """
    transfer = Transfer(
        _source(job, token),
        job.repository,
        job.commit,
        job.work,
        reporter.add,
        reporter.wait,
        pace,
        shared_files(job),
        reporter.fetch,
    )
    pool = ThreadPoolExecutor(max(job.connections, 1), "download")
    files = sorted(job.files, key=lambda file: -file.size_bytes)
    try:
        for fetched in as_completed([pool.submit(transfer.fetch, file) for file in files]):
            fetched.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return transfer.hashes


def _lock(lock: IO[str], job: DownloadJob) -> None:
    try:
        lock_file(lock, _LOCK_S)
    except BlockingIOError:
        raise Unavailable(
            f"{job.repository} is being downloaded to {job.target} already."
        ) from None


def _publish(job: DownloadJob) -> None:
    """Rename the folder, whose files are all whole, to the target."""
    if os.path.lexists(job.target):
        raise RequestError(
            f"{job.target.name!r} was created during the download; move it away, then resume.",
            param="target",
        )
    shutil.rmtree(partial_folder(job.work))
    # Children first: an entry of a folder is on the disk once that folder was flushed.
    for folder in sorted(_folders(job), reverse=True):
        flush_path(folder)
    job.work.rename(job.target)
    flush_path(job.target.parent)


def _folders(job: DownloadJob) -> set[Path]:
    """Return the work folder and all below it that have files or folders of the job."""
    within = (Path(file.path).parents for file in job.files)
    return {job.work / folder for parents in within for folder in parents} | {job.work}


def main() -> None:
    """Run the job that stdin describes."""
    die_with_parent()
    give_way()
    reporter = _Reporter(take_stdout())
    job = DownloadJob.from_json(sys.stdin.readline())
    token = sys.stdin.readline().strip()
    pace = Pace(job.limit_bytes_per_s)
    die_with_input(sys.stdin, lambda line: pace.change(int(line)))
    try:
        download(job, token, reporter, pace)
    except ImpetusError as error:
        reporter.send(
            {"error": error.code, "message": error.message, "retry_after_s": error.retry_after_s}
        )
        os._exit(1)
    reporter.send({**reporter.amounts(), "done": True})
    os._exit(0)


if __name__ == "__main__":
    main()
