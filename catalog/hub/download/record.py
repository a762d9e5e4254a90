"""Records in a model's folder where it was downloaded from, and finds files that are there already.

The record has the hash of every file, so what two models share is copied instead of fetched.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from backends.small_json import read_object
from catalog.hub.download.job import RECORD, DownloadJob
from catalog.hub.reference import check_path
from core.errors import BrokenModel, RequestError

_VERSION = 1
_SHA256_DIGITS = 64


@dataclass(frozen=True, slots=True)
class DownloadRecord:
    """Where a model's folder came from; `hashes` are SHA-256 or git's, by path."""

    endpoint: str
    repository: str
    commit: str
    url: str
    hashes: Mapping[str, str]
    sizes: Mapping[str, int]


def record_of(job: DownloadJob, hashes: Mapping[str, str]) -> str:
    """Return the text of the record of a finished job; `hashes` are those that were computed."""
    files = [
        {"path": file.path, "size": file.size_bytes, "hash": hashes.get(file.path, "")}
        for file in job.files
    ]
    return json.dumps(
        {
            "version": _VERSION,
            "endpoint": without_secrets(job.endpoint),
            "repository": job.repository,
            "commit": job.commit,
            "url": without_secrets(job.url),
            "files": files,
        },
        indent=1,
    )


def without_secrets(url: str) -> str:
    """Return an address without its query, which may sign it, and without user and password."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def read_record(folder: Path) -> DownloadRecord | None:
    """Return the record of a model's folder, None without a valid one."""
    try:
        found = read_object(folder / RECORD)
    except BrokenModel:
        return None
    files = found.get("files")
    if found.get("version") != _VERSION or not isinstance(files, list):
        return None
    hashes, sizes = {}, {}
    for file in files:
        path, size, digest = _parts(file)
        if path:
            hashes[path], sizes[path] = digest, size
    texts = [found.get(name) for name in ("endpoint", "repository", "commit", "url")]
    endpoint, repository, commit, url = (text if isinstance(text, str) else "" for text in texts)
    return DownloadRecord(endpoint, repository, commit, url, hashes, sizes)


def _parts(file: Any) -> tuple[str, int, str]:
    """Return path, size and hash of a file in a record; an empty path if one is not valid."""
    values = file if isinstance(file, dict) else {}
    path, size, digest = values.get("path"), values.get("size"), values.get("hash")
    if not isinstance(path, str) or type(size) is not int or not isinstance(digest, str):
        return "", 0, ""
    try:
        check_path(path)
    except RequestError:
        return "", 0, ""
    return path, size, digest


def shared_files(job: DownloadJob) -> dict[str, Path]:
    """Return files of other downloads that a job needs too, by SHA-256.

    Reads a small file in the folder of each model in the job's library; blocks.
    """
    wanted = {file.sha256 for file in job.files if len(file.sha256) == _SHA256_DIGITS}
    found: dict[str, Path] = {}
    for folder, record in _records(job):
        for path, digest in record.hashes.items():
            file = folder / path
            if digest in wanted - found.keys() and has_size(file, record.sizes[path]):
                found[digest] = file
    return found


def _records(job: DownloadJob) -> Iterator[tuple[Path, DownloadRecord]]:
    """Yield the models of the job's library, those beside its target first."""
    found = sorted(job.target.parent.glob(f"*/{RECORD}"))
    if job.library:
        found += sorted(Path(job.library).glob(f"*/*/{RECORD}"))
    for marker in dict.fromkeys(found):
        record = read_record(marker.parent)
        if record is not None:
            yield marker.parent, record


def has_size(file: Path, size: int) -> bool:
    """Whether there is a file of this size, which is not a link."""
    try:
        return not file.is_symlink() and file.is_file() and file.stat().st_size == size
    except OSError:
        return False
