"""The JSON in which the Hub describes repositories and their files."""

import posixpath
from collections.abc import Collection, Mapping
from typing import Any, get_args

from huggingface_hub import hf_api

from scripts.hub_lib import metadata
from scripts.hub_lib.faults import Fault
from scripts.hub_lib.repositories import Commit, HubFile, Repository
from scripts.hub_lib.search import BadQuery

EXPANDABLE = frozenset(get_args(hf_api.ExpandModelProperty_T))
_ALWAYS = ("_id", "id")
_LISTED = (
    *("likes", "trendingScore", "private", "downloads", "tags", "pipeline_tag"),
    *("library_name", "createdAt", "modelId"),
)
_FULL = ("author", "sha", "lastModified", "gated", "disabled", "siblings")
_ONE = (
    *_LISTED, *_FULL, "config", "cardData", "transformersInfo", "gguf", "safetensors", "spaces",
    "usedStorage",
)  # fmt: skip


def one(
    repository: Repository,
    commit: Commit,
    *,
    expand: Collection[str],
    has_blobs: bool,
    has_security: bool,
    lies: Mapping[str, Fault],
) -> dict[str, Any]:
    """Return the answer of `GET /api/models/ID`.  Raises BadQuery."""
    wanted = _ALWAYS + (_expanded(expand) if expand else _ONE)
    facts = _facts(repository, commit)
    found = {name: facts[name] for name in wanted if facts.get(name) is not None}
    if has_blobs:
        found["siblings"] = [sibling(file, lies) for file in commit.files.values()]
    if has_security:
        found["securityRepoStatus"] = security_status(repository)
    return found


def listed(
    repository: Repository,
    *,
    expand: Collection[str],
    is_full: bool,
    has_card: bool,
    has_config: bool,
) -> dict[str, Any]:
    """Return a repository's entry in a search.  Raises BadQuery."""
    extra = (("cardData",) if has_card else ()) + (("config",) if has_config else ())
    wanted = _LISTED + (_FULL if is_full else ()) + extra
    facts = _facts(repository, repository.commits[-1])
    names = _ALWAYS + (_expanded(expand) if expand else wanted)
    return {name: facts[name] for name in names if facts.get(name) is not None}


def _expanded(names: Collection[str]) -> tuple[str, ...]:
    if unknown := sorted(set(names) - EXPANDABLE):
        raise BadQuery(f"Invalid expand: {', '.join(unknown)}")
    return tuple(names)


def _facts(repository: Repository, commit: Commit) -> dict[str, Any]:
    card = metadata.card_data(commit)
    settings = metadata.config(commit)
    architectures = settings.get("architectures") or ["AutoModel"]
    return {
        "_id": commit.sha[:24],
        "id": repository.id,
        "modelId": repository.id,
        "author": repository.author,
        "sha": commit.sha,
        "lastModified": commit.date,
        "createdAt": repository.created,
        "private": repository.is_private,
        "gated": repository.gated,
        "disabled": repository.is_disabled,
        "likes": repository.likes,
        "downloads": repository.downloads,
        "trendingScore": repository.trending,
        "tags": metadata.tags(repository, commit),
        "pipeline_tag": card.get("pipeline_tag"),
        "library_name": card.get("library_name"),
        "cardData": card or None,
        "config": settings or None,
        "transformersInfo": {"auto_model": architectures[0]} if settings else None,
        "gguf": metadata.gguf(commit),
        "safetensors": metadata.safetensors(commit),
        "siblings": [{"rfilename": path} for path in commit.files],
        "spaces": [],
        "usedStorage": sum(file.size for file in commit.files.values()),
    }


def stated_size(file: HubFile, lies: Mapping[str, Fault]) -> int:
    """Return the size that the Hub states for a file."""
    return file.size + (int(lies["size"].value or 1) if "size" in lies else 0)


def stated_sha256(file: HubFile, lies: Mapping[str, Fault]) -> str:
    """Return the SHA-256 that the Hub states for a file."""
    return file.sha256[::-1] if "hash" in lies else file.sha256


def sibling(file: HubFile, lies: Mapping[str, Fault]) -> dict[str, Any]:
    """Return a file's entry in `siblings` with `blobs=true`."""
    size = stated_size(file, lies)
    found: dict[str, Any] = {"rfilename": file.path, "blobId": file.git_oid, "size": size}
    if file.is_lfs:
        found["lfs"] = {
            "sha256": stated_sha256(file, lies),
            "size": size,
            "pointerSize": len(file.pointer),
        }
    return found


def security_status(repository: Repository) -> dict[str, Any]:
    """Return the Hub's summary of its scans."""
    issues = [{"path": path, "level": scan["status"]} for path, scan in repository.security.items()]
    return {"scansDone": True, "filesWithIssues": issues}


def tree(
    repository: Repository,
    commit: Commit,
    folder: str,
    *,
    is_recursive: bool,
    is_expanded: bool,
    lies: Mapping[str, Fault],
) -> list[dict[str, Any]] | None:
    """Return the entries below `folder`, None if there is no such folder."""
    start = f"{folder}/" if folder else ""
    inside = [file for file in commit.files.values() if file.path.startswith(start)]
    if not inside:
        return None
    entries: dict[str, dict[str, Any]] = {}
    for file in inside:
        for parent in _parents(file.path, folder):
            if is_recursive or posixpath.dirname(parent) == folder:
                oid = commit.sha[::-1]
                entries.setdefault(
                    parent, {"type": "directory", "oid": oid, "size": 0, "path": parent}
                )
        if is_recursive or posixpath.dirname(file.path) == folder:
            entries[file.path] = _entry(repository, commit, file, is_expanded, lies)
    return [entries[path] for path in sorted(entries)]


def _parents(path: str, folder: str) -> list[str]:
    found = []
    while (path := posixpath.dirname(path)) and path != folder:
        found.append(path)
    return found


def _entry(
    repository: Repository,
    commit: Commit,
    file: HubFile,
    is_expanded: bool,
    lies: Mapping[str, Fault],
) -> dict[str, Any]:
    size = stated_size(file, lies)
    found: dict[str, Any] = {
        "type": "file", "oid": file.git_oid, "size": size, "path": file.path,
    }  # fmt: skip
    if file.is_lfs:
        found["lfs"] = {
            "oid": stated_sha256(file, lies),
            "size": size,
            "pointerSize": len(file.pointer),
        }
    if is_expanded:
        found["lastCommit"] = {"id": commit.sha, "title": commit.title, "date": commit.date}
        safe = {"status": "safe", "avScan": {"status": "safe"}, "pickleImportScan": None}
        found["securityFileStatus"] = dict(repository.security.get(file.path, safe))
    return found
