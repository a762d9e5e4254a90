"""Describes one repository of a hub: its models, files, licence, access and safety."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from catalog.hub import facts
from catalog.hub.client import HubClient
from catalog.hub.entries import HubEntry, RepositoryFile, group
from catalog.hub.readme import MAX_CHARACTERS, sanitize
from catalog.hub.reference import check_path
from catalog.hub.search import HubModel, describe
from core.errors import HubAnswerInvalid, HubNotFound, RequestError

MAX_FILES = 20_000
_MAX_README_BYTES = 4 * MAX_CHARACTERS
_HASH_LENGTH = 40


@dataclass(frozen=True, slots=True)
class Safety:
    """What of a repository could run code, or was found by the hub's scanners.

    `remote_code` are Python files, and the classes of `auto_map`, that a configuration names
    instead of a known architecture: this server never runs them.  `findings` are paths with the
    scanners' level; `is_scanned` False: the scans are not done.
    """

    pickles: tuple[str, ...]
    remote_code: tuple[str, ...]
    findings: tuple[tuple[str, str], ...]
    is_scanned: bool


@dataclass(frozen=True, slots=True)
class HubRepository:
    """A repository at one commit; all its files are of `commit`."""

    model: HubModel
    commit: str
    files: tuple[RepositoryFile, ...]
    entries: tuple[HubEntry, ...]
    safety: Safety
    has_readme: bool


def read_repository(client: HubClient, name: str, revision: str = "main") -> HubRepository:
    """Return the repository `name` at a revision; blocks.  Raises the errors `Hub…`."""
    path = f"/api/models/{name}/revision/{quote(revision, safe='')}"
    answer = client.get_json(path, name, {"blobs": True, "securityStatus": True})
    item = facts.mapping(answer.value)
    commit = facts.text(item.get("sha"))
    if len(commit) != _HASH_LENGTH or not set(commit) <= set("0123456789abcdef"):
        raise HubAnswerInvalid(f"{client.host} stated no commit of {name}.")
    files = _files(client, name, facts.sequence(item.get("siblings")))
    model = describe(item)
    return HubRepository(
        model=model,
        commit=commit,
        files=files,
        entries=group(files, facts.tags(item.get("tags"))),
        safety=_safety(item, files),
        has_readme=any(file.path == "README.md" for file in files),
    )


def read_readme(client: HubClient, repository: HubRepository) -> str:
    """Return the README as Markdown without HTML, empty without one; blocks."""
    name = repository.model.id
    address = client.file_address(name, repository.commit, "README.md")
    try:
        with client.opened(address, name) as response:
            body = client.read(response, _MAX_README_BYTES, is_cut=True)
    except HubNotFound:
        return ""
    base = f"{client.endpoint}/{name}/resolve/{repository.commit}"
    return sanitize(body.decode("utf-8", "replace"), base)


def _files(client: HubClient, name: str, siblings: Sequence[Any]) -> tuple[RepositoryFile, ...]:
    """Return the files with their hashes.  Raises HubAnswerInvalid for what is not one."""
    if len(siblings) > MAX_FILES:
        raise HubAnswerInvalid(
            f"{name} has {len(siblings):,} files; repositories of up to {MAX_FILES:,} are read."
        )
    listed = [(_file(sibling), sibling) for sibling in map(facts.mapping, siblings)]
    for file, _ in listed:
        try:
            check_path(file.path.replace(":", "_"))
        except RequestError as problem:
            raise HubAnswerInvalid(f"{client.host} lists for {name}: {problem.message}") from None
    # Not every system has colons in names; Windows leaves files with them beside its downloads.
    listed = [(file, sibling) for file, sibling in listed if ":" not in file.path]
    files = tuple(file for file, _ in listed)
    for file, sibling in listed:
        # Taken for 0 it would fit everywhere, and its download would be empty.
        if not file.size_bytes and sibling.get("size") != 0:
            raise HubAnswerInvalid(
                f"{client.host} states no size of {file.path[:80]!r} in {name}. If it is a mirror, "
                "unset HF_ENDPOINT or use another one."
            )
    if len({file.path for file in files}) != len(files) or not all(file.path for file in files):
        raise HubAnswerInvalid(f"{client.host} lists a file of {name} twice, or one without name.")
    return files


def _file(sibling: Mapping[str, Any]) -> RepositoryFile:
    path = sibling.get("rfilename")
    large = facts.mapping(sibling.get("lfs"))
    return RepositoryFile(
        path=path if isinstance(path, str) and len(path) <= 1024 else "",
        size_bytes=facts.number(sibling.get("size")),
        git_oid=facts.text(sibling.get("blobId")),
        sha256=facts.text(large.get("sha256")),
    )


def _safety(item: Mapping[str, Any], files: Sequence[RepositoryFile]) -> Safety:
    settings = facts.mapping(item.get("config"))
    scan = facts.mapping(item.get("securityRepoStatus"))
    code = [file.path for file in files if file.path.endswith(".py")]
    classes = [f"auto_map: {facts.text(key)}" for key in facts.mapping(settings.get("auto_map"))]
    found = (facts.mapping(one) for one in facts.sequence(scan.get("filesWithIssues")))
    return Safety(
        pickles=tuple(file.path for file in files if file.is_pickle),
        remote_code=tuple(code + classes),
        findings=tuple(
            (facts.text(one.get("path")), facts.text(one.get("level"))) for one in found
        ),
        is_scanned=scan.get("scansDone") is True,
    )
