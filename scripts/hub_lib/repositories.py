"""The test hub's repositories: commits of local folders, with the hashes that the Hub states.

Source of the forms: the answers of huggingface.co to huggingface_hub 2.4, and git's blob hashes.
"""

import hashlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

_READ_BYTES = 1 << 20
_LFS_OVER_BYTES = 10_000_000
_LFS_SUFFIXES = frozenset({
    ".bin", ".gguf", ".h5", ".mlmodel", ".msgpack", ".npz", ".onnx", ".pt", ".pth", ".safetensors",
})  # fmt: skip


@dataclass(frozen=True)
class HubFile:
    """One file of a commit.  Its content is read from `source` when it is asked for.

    `stated_sha256` takes the place of the real hash, for sparse files too large to read.
    """

    path: str
    source: Path
    stated_sha256: str = ""

    @cached_property
    def size(self) -> int:
        """Number of bytes."""
        return self.source.stat().st_size

    @cached_property
    def is_lfs(self) -> bool:
        """Whether the Hub keeps the file in Git LFS, by its suffix or size."""
        return Path(self.path).suffix.lower() in _LFS_SUFFIXES or self.size > _LFS_OVER_BYTES

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the content."""
        return self.stated_sha256 or self._digest(hashlib.sha256())

    @cached_property
    def pointer(self) -> bytes:
        """The text that git keeps in place of a file in LFS."""
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\n"
            f"size {self.size}\n"
        ).encode()

    @cached_property
    def git_oid(self) -> str:
        """The hash of git's blob: of the content, or of the pointer to LFS."""
        if self.is_lfs:
            start = b"blob %d\0" % len(self.pointer)
            return hashlib.sha1(start + self.pointer, usedforsecurity=False).hexdigest()
        digest = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        return self._digest(digest)

    @property
    def etag(self) -> str:
        """The ETag without quotes: the SHA-256 in LFS, else the git hash."""
        return self.sha256 if self.is_lfs else self.git_oid

    def _digest(self, digest: Any) -> str:
        with self.source.open("rb") as stream:
            while piece := stream.read(_READ_BYTES):
                digest.update(piece)
        return str(digest.hexdigest())


@dataclass(frozen=True, slots=True)
class Commit:
    """One revision of a repository: its files by path, in order."""

    sha: str
    title: str
    date: str
    files: Mapping[str, HubFile]


@dataclass(slots=True)
class Repository:
    """A model repository; the last commit is `main`.

    `security` is the scan result of unsafe files by path, as the Hub states it in
    `securityFileStatus`; files without one are `safe`.  `readers` are the users whose access to a
    gated or private repository was granted.
    """

    id: str
    commits: list[Commit] = field(default_factory=list)
    tags: tuple[str, ...] = ()
    gated: Literal["auto", "manual", False] = False
    is_private: bool = False
    is_disabled: bool = False
    readers: frozenset[str] = frozenset()
    likes: int = 0
    downloads: int = 0
    trending: int = 0
    created: str = "2026-01-01T00:00:00.000Z"
    security: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    @property
    def author(self) -> str:
        """The user or organization before the slash."""
        return self.id.partition("/")[0]

    def commit(self, revision: str = "main") -> Commit | None:
        """Return the commit that a branch, a tag or a whole hash names."""
        if revision == "main":
            return self.commits[-1]
        wanted = self.refs.get(revision, revision)
        return next((one for one in self.commits if one.sha == wanted), None)

    def add(
        self,
        folder: Path,
        *,
        title: str = "Upload",
        sha: str = "",
        date: str = "",
        stated: Mapping[str, str] | None = None,
    ) -> Commit:
        """Make the present files of `folder` the newest commit.

        `sha` is its hash, by default one of its content; `stated`: see `HubFile.stated_sha256`.
        """
        files = {
            path: HubFile(path, source, (stated or {}).get(path, ""))
            for path, source in _files(folder)
        }
        return self._append(files, title, sha, date)

    def move(self) -> Commit:
        """Add a commit with the same files, as a change of the repository while it is read."""
        return self._append(self.commits[-1].files, "Move", "", "")

    def _append(self, files: Mapping[str, HubFile], title: str, sha: str, date: str) -> Commit:
        digest = hashlib.sha1(f"{self.id} {len(self.commits)}".encode(), usedforsecurity=False)
        for file in files.values():
            digest.update(f"{file.path} {file.size}".encode())
        when = date or time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        commit = Commit(sha or digest.hexdigest(), title, when, files)
        self.commits.append(commit)
        return commit


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for source in sorted(folder.rglob("*")):
        if source.is_file():
            yield source.relative_to(folder).as_posix(), source
