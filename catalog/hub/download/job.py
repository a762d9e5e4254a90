"""What a download job is to do: the files of one model at one commit; pure, JSON-serializable."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from catalog.hub.entries import RepositoryFile

# In the hidden folder of a download; the process that downloads keeps it locked.
LOCK = ".lock"


@dataclass(frozen=True, slots=True)
class DownloadJob:
    """Files of a repository, all of `commit`, that become the folder `target`.

    With `url` it is one file at that address, and the repository is its name in messages.  Up to
    `connections` files are fetched at the same time, all together at most `limit_bytes_per_s` (0:
    no limit); `silence_s` without a byte a connection is made anew.  A token is not part of a job:
    jobs are stored and shown.
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

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size_bytes for file in self.files)

    @property
    def work(self) -> Path:
        """The hidden folder beside the target that holds what has arrived."""
        return self.target.with_name(f".{self.target.name}.download")

    def to_json(self) -> str:
        """Return the job as one line of JSON."""
        return json.dumps({**asdict(self), "target": str(self.target)})

    @classmethod
    def from_json(cls, text: str) -> "DownloadJob":
        """Return the job that `to_json` wrote."""
        values: Mapping[str, Any] = json.loads(text)
        files = tuple(RepositoryFile(**file) for file in values["files"])
        return cls(**{**values, "files": files, "target": Path(values["target"])})
