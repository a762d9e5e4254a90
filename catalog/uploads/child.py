"""Child process that checks, copies, inspects and publishes a model: `-m catalog.uploads.child`.

Reads one line of JSON from stdin: `{"arrival": …, "home": …, "formats": […], "roots": […]}`.
Writes lines of JSON to stdout: `{"done_bytes": …, "total_bytes": …}`, and at the end
`{"done": true}` or `{"error": code, "message": …, "retry_after_s": …}`.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from backends.registry import backends_for
from catalog.models import ARRIVAL_RECORD
from catalog.scan.inspector import Inspector
from catalog.uploads.arrival import Arrival
from catalog.uploads.copy import copy_files, files_of, move_folder
from catalog.uploads.trial import try_scan
from core.child import die_with_input, die_with_parent, give_way, take_stdout
from core.errors import BrokenModel, ImpetusError, RequestError, Unavailable
from core.files import open_regular, why, write_atomically
from core.units import MIB

_REPORT_S = 0.25
_PIECE_BYTES = 4 * MIB


@dataclass(slots=True)
class _Reporter:
    """Sends progress to the parent, at most four times in a second."""

    pipe: IO[str]
    total_bytes: int = 0
    done_bytes: int = 0
    _sent_s: float = 0.0

    def add(self, count: int) -> None:
        """Count bytes that were read or copied."""
        self.done_bytes += count
        now = time.monotonic()
        if now - self._sent_s >= _REPORT_S:
            self._sent_s = now
            self.tell()

    def tell(self) -> None:
        """Send how far it is."""
        self.send({"done_bytes": self.done_bytes, "total_bytes": self.total_bytes})

    def send(self, message: Mapping[str, Any]) -> None:
        """Write one line."""
        self.pipe.write(json.dumps(message) + "\n")
        self.pipe.flush()


def arrive(
    arrival: Arrival, home: Path, formats: Sequence[str], roots: Sequence[Path], report: _Reporter
) -> None:
    """Do all of an arrival that an earlier process has not done.

    Raises BrokenModel for what cannot be used, RequestError, InsufficientDisk, Unavailable.
    """
    quarantine, target = arrival.quarantine(home), arrival.folder(home)
    is_moved = arrival.how != "in_place"
    if is_moved and os.path.lexists(target):
        if not quarantine.exists():
            return
        raise RequestError(
            f"{target} was created meanwhile; move it away, then resume.", param="name"
        )
    if arrival.how == "upload":
        _verify(arrival, quarantine, report)
    elif is_moved:
        files = files_of(Path(arrival.source), roots)
        report.total_bytes = sum(file.size_bytes for file in files)
        copy_files(files, quarantine, may_clone=arrival.how == "clone", add=report.add)
    report.tell()
    _inspect(quarantine.parent if is_moved else quarantine, formats)
    if is_moved:
        try:
            _record(quarantine)
            move_folder(quarantine, target)
        except OSError as problem:
            raise Unavailable(
                f"The model cannot be moved to {target}: {why(problem)}."
            ) from problem


def _verify(arrival: Arrival, folder: Path, report: _Reporter) -> None:
    """Compare sizes and hashes with what was announced."""
    report.total_bytes = arrival.size_bytes
    for file in arrival.files:
        digest = hashlib.sha256()
        size = 0
        try:
            with open_regular(folder / file.path) as reader:
                size = os.fstat(reader.fileno()).st_size
                while file.sha256 and (piece := reader.read(_PIECE_BYTES)):
                    digest.update(piece)
                    report.add(len(piece))
        except OSError as problem:
            raise RequestError(
                f"The uploaded file {file.path!r} is not there any more ({why(problem)}); upload "
                "the model again."
            ) from problem
        if not file.sha256:
            report.add(size)
        if size != file.size_bytes or file.sha256 not in ("", digest.hexdigest()):
            raise BrokenModel(
                f"{file.path} has {size} bytes and the SHA-256 {digest.hexdigest()}, but "
                f"{file.size_bytes} bytes and {file.sha256} were announced; upload it again."
            )


def _record(folder: Path) -> None:
    """Note which files belong to the model, so that they are deleted with it.  Raises OSError."""
    files = [path for path in sorted(folder.rglob("*")) if not path.is_dir()]
    paths = [{"path": path.relative_to(folder).as_posix()} for path in files]
    write_atomically(folder / ARRIVAL_RECORD, json.dumps({"files": paths}).encode(), mode=0o644)


def _inspect(folder: Path, formats: Sequence[str]) -> None:
    inspector = Inspector(list(formats))
    try:
        try_scan(folder, list(backends_for(list(formats)).values()), inspector.examine)
    finally:
        inspector.close()


def main() -> None:
    """Do what stdin describes."""
    die_with_parent()
    give_way()
    reporter = _Reporter(take_stdout())
    task = json.loads(sys.stdin.readline())
    die_with_input(sys.stdin)
    home = Path(task["home"])
    roots = [Path(root) for root in task["roots"]]
    try:
        arrive(Arrival.from_json(task["arrival"]), home, task["formats"], roots, reporter)
    except ImpetusError as error:
        reporter.send(
            {"error": error.code, "message": error.message, "retry_after_s": error.retry_after_s}
        )
        os._exit(1)
    reporter.tell()
    reporter.send({"done": True})
    os._exit(0)


if __name__ == "__main__":
    main()
