"""What a download job is to do: the files of one model at one commit; pure, JSON-serializable."""

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from catalog.hub.entries import RepositoryFile
from catalog.hub.reference import check_path
from catalog.models import DOWNLOAD_RECORD
from core.errors import RequestError

# The folder of unfinished files, and in it the file that the process which downloads keeps locked.
_PARTIAL = ".partial"
_LOCK = "lock"
RECORD = DOWNLOAD_RECORD


@dataclass(frozen=True, slots=True)
class DownloadJob:
    """Files of a repository, all of `commit`, that become the folder `target`.

    With `url` it is one file at that address, and the repository is its name in messages.  Up to
    `connections` files are fetched at the same time, all together at most `limit_bytes_per_s` (0:
    no limit); `silence_s` without a byte a connection is made anew.  `library` is the folder with
    the folders of owners, in which models may have files that this one needs too; empty: only those
    beside the target.  `private_hosts` are those of `UrlSource`, set for each run.  A token is not
    part of a job: jobs are stored and shown.
    """

    endpoint: str
    repository: str
    commit: str
    files: tuple[RepositoryFile, ...]
    target: Path
    limit_bytes_per_s: int = 0
    silence_s: float = 30.0
    connections: int = 4
    url: str = ""
    library: str = ""
    private_hosts: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size_bytes for file in self.files)

    @property
    def work(self) -> Path:
        """The hidden folder beside the target that holds what has arrived."""
        return self.target.with_name(f".{self.target.name}.download")

    def check(self) -> None:
        """Raise RequestError for files that one folder cannot hold, or that would leave it."""
        seen: set[str] = set()
        for file in self.files:
            check_path(file.path)
            # Systems differ in which names are the same.
            name = unicodedata.normalize("NFC", file.path).casefold()
            is_taken = name in seen or name == RECORD
            if is_taken or name.startswith(_PARTIAL) or not name:
                raise RequestError(
                    f"{file.path[:80]!r} cannot be stored beside the other files of "
                    f"{self.repository}; choose files one by one.",
                    param="files",
                )
            seen.add(name)

    def to_json(self) -> str:
        """Return the job as one line of JSON."""
        return json.dumps({**asdict(self), "target": str(self.target)})

    @classmethod
    def from_json(cls, text: str) -> "DownloadJob":
        """Return the job that `to_json` wrote."""
        values: Mapping[str, Any] = json.loads(text)
        files = tuple(RepositoryFile(**file) for file in values["files"])
        hosts = tuple(values.get("private_hosts", ()))
        target = Path(values["target"])
        return cls(**{**values, "files": files, "target": target, "private_hosts": hosts})


def partial_folder(work: Path) -> Path:
    """Return where the unfinished files of a download are."""
    return work / _PARTIAL


def partial_file(work: Path, path: str) -> Path:
    """Return where a file is while it is not whole; no name in a repository leads there."""
    name = hashlib.sha256(path.encode()).hexdigest()[:32]
    return work / _PARTIAL / f"{name}.part"


def lock_path(work: Path) -> Path:
    """Return the file that the process which downloads keeps locked."""
    return work / _PARTIAL / _LOCK
