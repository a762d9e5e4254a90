"""Inspects the models of a repository without downloading them, and judges whether they fit."""

import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from backends.base import Backend, EngineOptions, ModelInfo
from catalog.hub.client import HubClient
from catalog.hub.entries import QUANTIZATION, HubEntry
from catalog.hub.fit import DEFAULT_CONTEXT, Fit, Room, judge, judge_size
from catalog.hub.repository import HubRepository
from catalog.hub.skeleton import NoSkeleton, SkeletonBuilder
from catalog.scan.identify import Outcome, Refused, Uninspected, Unknown
from core.errors import (
    BackendUnavailable,
    BrokenModel,
    HubAccessDenied,
    HubTokenRejected,
    HubTooSlow,
)
from core.files import why

Examine = Callable[[Path], Outcome]

# Models of one repository that are inspected, one after the other, and for how long.
MOST_INSPECTED = 48
_LONGEST_S = 40.0
_EXTENSION = re.compile(r"\.\w+$")


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """A model of a repository as inspected before its download.

    `info` is None where that could not be done; `problem` says why, `is_refused` that this server
    cannot run the model.  `denial` is the error of a hub that gives this user no files.
    """

    entry: HubEntry
    info: ModelInfo | None
    problem: str = ""
    is_refused: bool = False
    denial: HubAccessDenied | HubTokenRejected | None = None

    @property
    def format(self) -> str:
        """That of the content, if it was inspected, else the one that names and tags promise."""
        return self.info.format if self.info is not None else self.entry.format


def inspect_repository(
    client: HubClient,
    repository: HubRepository,
    examine: Examine,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[RemoteModel, ...]:
    """Inspect the models from their headers; blocks, reads up to some MiB for each base model.

    `examine` is that of `catalog.scan.inspector`.  GGUF files that differ in their quantization
    alone are inspected once.  Up to 48 base models are inspected, for about 40 s; of the others
    nothing is known.  Raises the errors `Hub…`, except for files that this user may not have.
    """
    found: list[RemoteModel] = []
    end = clock() + _LONGEST_S
    for number, group in enumerate(_alike(repository.entries)):
        if number >= MOST_INSPECTED or (number and clock() > end):
            problem = (
                f"It was not inspected: {repository.model.id} has {len(repository.entries):,} "
                "models."
            )
            found += [RemoteModel(entry, None, problem) for entry in group]
            continue
        if found and found[-1].denial is not None:
            # The hub gives access to all files of a repository or to none.
            found += [replace(found[-1], entry=entry) for entry in group]
            continue
        first = min(group, key=lambda entry: (entry.missing, len(entry.weights), entry.size_bytes))
        model = _inspect(client, repository, first, examine)
        found += [model if entry is first else _resized(model, entry) for entry in group]
    order = {entry.name: number for number, entry in enumerate(repository.entries)}
    return tuple(sorted(found, key=lambda model: order[model.entry.name]))


def fit_of(
    model: RemoteModel,
    backends: Mapping[str, Backend],
    options: EngineOptions,
    room: Room,
    context_tokens: int = DEFAULT_CONTEXT,
) -> Fit:
    """Return whether a model fits here at a context; pure."""
    backend = backends.get(model.format)
    if model.info is None or backend is None:
        reason = model.problem or f"The format {model.format} is not enabled."
        return judge_size(model.entry.weights_bytes, reason, room)
    try:
        return judge(model.info, backend.estimate, options, room, context_tokens)
    except BackendUnavailable as problem:
        # Such as a Core ML model for a newer macOS.
        return judge_size(model.entry.weights_bytes, problem.message, room)


def _alike(entries: Sequence[HubEntry]) -> list[list[HubEntry]]:
    """Return the entries grouped by what differs in the quantization alone."""
    groups: dict[object, list[HubEntry]] = {}
    for entry in entries:
        key = _base(entry.name) if entry.format == "gguf" else (entry.name,)
        groups.setdefault((entry.format, key), []).append(entry)
    return list(groups.values())


def _base(name: str) -> tuple[str, ...]:
    """Return a GGUF file's path without quantizations, and without folders that say no more."""
    *folders, stem = _EXTENSION.sub("", name).lower().split("/")
    base = QUANTIZATION.sub("", stem)
    around = (QUANTIZATION.sub("", folder) for folder in folders)
    return (*(folder for folder in around if folder not in ("", base)), base)


def _inspect(
    client: HubClient, repository: HubRepository, entry: HubEntry, examine: Examine
) -> RemoteModel:
    if entry.missing:
        return RemoteModel(entry, None, f"{entry.missing} of its shards are missing.", True)
    folder = Path(tempfile.mkdtemp(prefix="impetus-hub-"))
    try:
        builder = SkeletonBuilder(client, repository.model.id, repository.commit, folder)
        path = builder.build(entry)
        return _judged(entry, examine(path.resolve()))
    except BrokenModel as problem:
        return RemoteModel(entry, None, problem.message, True)
    except NoSkeleton as reason:
        return RemoteModel(entry, None, f"It cannot be told before the download: {reason}.")
    except (HubAccessDenied, HubTokenRejected) as problem:
        return RemoteModel(entry, None, problem.message, denial=problem)
    except HubTooSlow as problem:
        return RemoteModel(entry, None, f"It was not inspected. {problem.message}")
    except OSError as problem:
        # Such as a full disk, or a size that no file can have.
        return RemoteModel(entry, None, f"It was not inspected ({why(problem)}).")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _judged(entry: HubEntry, outcome: Outcome) -> RemoteModel:
    match outcome:
        case ModelInfo():
            return RemoteModel(entry, outcome)
        case Refused(reason=reason):
            return RemoteModel(entry, None, reason, True)
        case Uninspected(reason=reason):
            return RemoteModel(entry, None, f"It was not inspected: {reason}.")
        case Unknown():
            return RemoteModel(entry, None, "No format of this server recognizes it.", True)


def _resized(model: RemoteModel, entry: HubEntry) -> RemoteModel:
    """Return the result for a model that differs from an inspected one in its quantization."""
    if entry.missing:
        return RemoteModel(entry, None, f"{entry.missing} of its shards are missing.", True)
    if model.info is None:
        return replace(model, entry=entry)
    info = replace(
        model.info,
        size_bytes=entry.weights_bytes,
        quantization=entry.quantization or model.info.quantization,
        details={**model.info.details, "tensor_bytes": entry.weights_bytes},
    )
    return RemoteModel(entry, info)
