"""Reads the hub for the routes: what of a repository fits here, which is best, its download."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from backends.base import Backend, EngineOptions
from catalog.convert.choice import least_lossy_conversion
from catalog.hub.choice import Candidate, HubChoice, choose, preferred_formats
from catalog.hub.client import HubClient
from catalog.hub.download.job import DownloadJob
from catalog.hub.download.url import UrlSource
from catalog.hub.entries import HubEntry, why_none
from catalog.hub.fit import DEFAULT_CONTEXT, Room
from catalog.hub.plan import meant_entries, repository_download, url_download
from catalog.hub.reference import HubReference, is_plain_address, parse_reference
from catalog.hub.remote import RemoteModel, fit_of, inspect_repository
from catalog.hub.repository import HubRepository, read_readme, read_repository
from catalog.hub.search import HubQuery, search
from catalog.scan.inspector import Inspector
from core.errors import HubUnavailable, RequestError
from core.supervision import call_in_thread
from deployments.jobs.downloads import is_there
from deployments.jobs.hub_views import reference_of, repository_of, results_of
from router.hub_service import HubReferenceAnswer, HubRepositoryAnswer, HubResults, HubSearch

# Each is a child process.
_MOST_INSPECTIONS = 2
_MOST_INSPECTED = 32

Result = TypeVar("Result")
RoomNow = Callable[[], Awaitable[Room]]


class HubReader:
    """Asks one hub, on threads: a hub that is slow takes none of the shared pool.

    `folder` is that of downloads, `room` is asked for the memory that is free now.  `connect` makes
    a client, which reads the user's token, and blocks.
    """

    def __init__(
        self,
        backends: Mapping[str, Backend],
        options: EngineOptions,
        folder: Path,
        room: RoomNow,
        connect: Callable[[], HubClient],
        private_hosts: Collection[str] = (),
    ) -> None:
        """`private_hosts` are those of `UrlSource`."""
        self._backends = backends
        self._options = options
        self._room = room
        self._connect = connect
        self._private_hosts = private_hosts
        self._folder = folder
        self._one_inspection = asyncio.Semaphore(_MOST_INSPECTIONS)
        # By repository and commit, the last used last: another context asks for the same.
        self._inspected: OrderedDict[tuple[str, str], tuple[RemoteModel, ...]] = OrderedDict()

    async def search(self, wanted: HubSearch) -> HubResults:
        """Return the next results; see `router.hub_service.Hub`."""
        query = HubQuery(**wanted.model_dump())
        page = await self._in_thread(lambda: search(self._connect(), query))
        return results_of(page, await self._room())

    async def repository(
        self, name: str, revision: str, context_tokens: int
    ) -> HubRepositoryAnswer:
        """Return a repository with what fits; see `router.hub_service.Hub`."""
        client, reference, found = await self._read(name, revision)
        candidates = await self._candidates(client, reference, found, context_tokens)

        def finish() -> HubRepositoryAnswer:
            choice = self._best(candidates)
            if not candidates:
                choice = replace(choice, reason=why_none(found.files))
            here = [
                entry.name
                for entry in found.entries
                if not entry.missing
                and is_there(
                    repository_download(client.endpoint, reference, found, entry, self._folder)
                )
            ]
            return repository_of(found, candidates, choice, here)

        return await self._in_thread(finish)

    async def readme(self, name: str, revision: str) -> str:
        """Return a README as Markdown; see `router.hub_service.Hub`."""
        client, _, found = await self._read(name, revision)
        if not found.has_readme:
            return ""
        return await self._in_thread(lambda: read_readme(client, found))

    async def resolve(self, text: str) -> HubReferenceAnswer:
        """Return what a pasted text refers to; see `router.hub_service.Hub`."""
        client = await self._in_thread(self._connect)
        return reference_of(text, client.endpoint)

    async def _read(
        self, model: str, revision: str
    ) -> tuple[HubClient, HubReference, HubRepository]:
        client = await self._in_thread(self._connect)
        reference = _reference(model, revision, client.endpoint)
        found = await self._in_thread(
            lambda: read_repository(client, reference.repository, reference.revision or "main")
        )
        return client, reference, found

    async def plan(self, model: str, revision: str, name: str) -> DownloadJob:
        """Return the download of what a user means; see `router.job_service.Jobs.download`."""
        client = await self._in_thread(self._connect)
        if is_plain_address(model, client.endpoint):
            if revision or name:
                raise RequestError(
                    "revision and entry are for repositories of the hub, not for an address.",
                    param="revision" if revision else "entry",
                )
            url = model.strip()
            source = UrlSource(url, private_hosts=self._private_hosts)
            file = await self._in_thread(source.probe)
            return url_download(url, file, self._folder)
        client, reference, repository = await self._read(model, revision)
        entries = meant_entries(repository, reference, name)
        entry = entries[0]
        is_named = bool(name or reference.file or reference.quantization)
        if len(entries) == 1 and is_named:
            await self._require_usable(client, reference, repository, entry)
        else:
            candidates = await self._candidates(client, reference, repository, DEFAULT_CONTEXT)
            meant = [one for one in candidates if one.model.entry in entries]
            chosen = await self._in_thread(lambda: self._best(meant))
            if chosen.candidate is None:
                is_hopeless = all(one.model.is_refused for one in meant)
                hint = "" if is_hopeless else " Name an entry to download it all the same."
                raise RequestError(
                    f"Nothing of {reference.repository} was chosen. {chosen.reason}{hint}",
                    param="model",
                )
            entry = chosen.candidate.model.entry
            if (denial := chosen.candidate.model.denial) is not None:
                raise denial
        return repository_download(client.endpoint, reference, repository, entry, self._folder)

    async def _require_usable(
        self,
        client: HubClient,
        reference: HubReference,
        repository: HubRepository,
        entry: HubEntry,
    ) -> None:
        """Raise RequestError for a model that would be refused, and removed, once it is here."""
        alone = replace(repository, entries=(entry,))
        key = (reference.repository, repository.commit)
        known = [one for one in self._inspected.get(key, ()) if one.entry == entry]
        try:
            async with self._one_inspection:
                (model,) = known or [*await self._in_thread(lambda: self._inspect(client, alone))]
        except HubUnavailable:
            # The download waits until the hub is back, and the scan looks at what arrived.
            return
        if model.denial is not None:
            raise model.denial
        if model.is_refused:
            raise RequestError(
                f"{entry.name} of {repository.model.id} cannot be used here, so it is not "
                f"downloaded. {model.problem}",
                param="model",
            )

    async def _candidates(
        self,
        client: HubClient,
        reference: HubReference,
        repository: HubRepository,
        context_tokens: int,
    ) -> list[Candidate]:
        """Return all models of a repository, each with whether it fits now."""
        room = await self._room()
        key = (reference.repository, repository.commit)
        async with self._one_inspection:
            models = self._inspected.get(key)
            if models is None:
                models = await self._in_thread(lambda: self._inspect(client, repository))
                # What could not be inspected for now is tried again.
                if all(one.info is not None or one.is_refused for one in models):
                    self._inspected[key] = models
                    while len(self._inspected) > _MOST_INSPECTED:
                        self._inspected.popitem(last=False)
            else:
                self._inspected.move_to_end(key)
        return [
            Candidate(one, fit_of(one, self._backends, self._options, room, context_tokens))
            for one in models
        ]

    def _inspect(self, client: HubClient, repository: HubRepository) -> tuple[RemoteModel, ...]:
        """Return the models of a repository from their headers; blocks."""
        inspector = Inspector(list(self._backends))
        try:
            return inspect_repository(client, repository, inspector.examine)
        finally:
            inspector.close()

    def _best(self, candidates: Sequence[Candidate]) -> HubChoice:
        """Return the best of the candidates; blocks."""
        runnable = {name for name, one in self._backends.items() if one.availability().is_available}
        convertible = {}
        for one in candidates:
            info = one.model.info
            target = info and least_lossy_conversion(info, runnable)
            if target:
                convertible[one.model.format] = target[0]
        return choose(candidates, runnable, convertible, preferred_formats())

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        return await call_in_thread("impetus-hub", work)


def _reference(model: str, revision: str, endpoint: str) -> HubReference:
    """Return what was pasted, at `revision` if that is not empty.  Raises RequestError."""
    found = parse_reference(model, endpoint)
    if not revision:
        return found
    # Checked as one that was pasted.
    asked = parse_reference(f"hf://{found.repository}@{revision}", endpoint)
    return replace(found, revision=asked.revision)
