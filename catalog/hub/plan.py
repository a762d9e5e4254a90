"""Plans downloads: which of a repository's models is meant, and the folder it gets; pure."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from catalog.hub.download.job import DownloadJob
from catalog.hub.entries import HubEntry, RepositoryFile, quantization_in, why_none
from catalog.hub.reference import HubReference
from catalog.hub.repository import HubRepository
from core.errors import RequestError

_MOST_NAMED = 20
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_LONGEST_NAME = 100


def meant_entries(
    repository: HubRepository, reference: HubReference, name: str = ""
) -> tuple[HubEntry, ...]:
    """Return the models of a repository that `reference` means: all if it says no more.

    `name` is that of an entry, if the user chose one.  Raises RequestError, naming what there is.
    """
    found = repository.entries
    if not found:
        reason = why_none(repository.files)
        raise RequestError(f"{reference.repository}: {reason}", param="model")
    if name:
        found = tuple(entry for entry in found if entry.name == name)
        what = f"model {name[:80]!r}"
    elif reference.file:
        found = tuple(entry for entry in found if _has(entry, reference.file))
        what = f"model in {reference.file[:80]!r}"
    elif reference.quantization:
        found = _tagged(found, reference.quantization)
        what = f"quantization {reference.quantization!r}"
    else:
        return found
    if not found:
        names = [entry.quantization or entry.name for entry in repository.entries]
        there = ", ".join(dict.fromkeys(names[:_MOST_NAMED]))
        hint = f" It has: {there}." if there else ""
        raise RequestError(f"{reference.repository} has no {what}.{hint}", param="model")
    return found


def _tagged(entries: Sequence[HubEntry], tag: str) -> tuple[HubEntry, ...]:
    """Return the models that a tag means: a quantization or, as Ollama has it, a file's name."""
    wanted = tag.lower()
    named = tuple(entry for entry in entries if wanted in _file_names(entry))
    if named:
        return named
    quantization = quantization_in(tag) or wanted
    found = tuple(entry for entry in entries if entry.quantization == quantization)
    # Of two with the same quantization, such as UD-Q4_K_M and Q4_K_M, the one that says it.
    exact = tuple(entry for entry in found if wanted in entry.name.lower())
    return exact or found


def _file_names(entry: HubEntry) -> set[str]:
    """Return the names of a model's files in lower case, with and without their suffixes."""
    paths = [entry.name, *(file.path for file in entry.weights)]
    names = {PurePosixPath(path.lower()) for path in paths}
    return {name.name for name in names} | {name.stem for name in names}


def _has(entry: HubEntry, path: str) -> bool:
    """Whether a file or a folder of the repository is one of the entry's weights, or has them."""
    inside = f"{path.rstrip('/')}/"
    return any(file.path == path or file.path.startswith(inside) for file in entry.weights)


def repository_download(
    endpoint: str,
    reference: HubReference,
    repository: HubRepository,
    entry: HubEntry,
    folder: Path,
) -> DownloadJob:
    """Return the download of a model into a folder of its own below `folder`.

    Its path is made of the user's words, which were checked, not of the hub's.  Raises
    RequestError for a model of which shards are missing.
    """
    if entry.missing:
        raise RequestError(
            f"{entry.missing} of the shards of {entry.name} are missing in {reference.repository}; "
            "choose another model.",
            param="entry",
        )
    owner, _, name = reference.repository.rpartition("/")
    job = DownloadJob(
        endpoint,
        reference.repository,
        repository.commit,
        entry.files,
        folder / (owner or "models") / _folder_name(name, reference, repository, entry),
        library=str(folder),
    )
    job.check()
    return job


def url_download(url: str, file: RepositoryFile, folder: Path) -> DownloadJob:
    """Return the download of a file at a plain address into a folder of its own."""
    stem = _UNSAFE.sub("-", Path(file.path).stem).strip("-.") or "model"
    job = DownloadJob(
        "", file.path, "", (file,), folder / "web" / f"{stem[:_LONGEST_NAME]}-{_digest(url)}",
        url=url,
    )  # fmt: skip
    job.check()
    return job


def _folder_name(
    name: str, reference: HubReference, repository: HubRepository, entry: HubEntry
) -> str:
    """Return the repository's name with what tells its models and revisions apart.

    Quantizations and most formats at its end do not become part of the model's name.
    """
    parts = [name]
    if reference.revision not in ("", "main"):
        parts.append(repository.commit[:8])
    if len(repository.entries) > 1:
        if len(_alike(repository.entries, entry)) > 1:
            parts.append(_digest(entry.name))
        parts += [entry.quantization] if entry.quantization else []
        parts.append(entry.format)
    return _UNSAFE.sub("-", "-".join(parts))


def _alike(entries: Sequence[HubEntry], entry: HubEntry) -> list[HubEntry]:
    return [
        each
        for each in entries
        if (each.format, each.quantization) == (entry.format, entry.quantization)
    ]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
