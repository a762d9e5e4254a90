"""Reads the hub for the routes: what of a repository fits here, which is best, its download."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from backends.base import Backend, EngineOptions
from catalog.convert.choice import least_lossy_conversion
from catalog.hub.choice import Candidate, HubChoice, choose, preferred_formats
from catalog.hub.client import HubClient
from catalog.hub.download.job import DownloadJob
from catalog.hub.download.url import UrlSource
from catalog.hub.entries import HubEntry
from catalog.hub.fit import DEFAULT_CONTEXT, Room
from catalog.hub.plan import meant_entries, repository_download, url_download
from catalog.hub.reference import HubReference, is_plain_address, parse_reference
from catalog.hub.remote import fit_of, inspect_repository
from catalog.hub.repository import HubRepository, read_repository
from catalog.scan.inspector import Inspector
from core.errors import RequestError
from core.supervision import call_in_thread

Result = TypeVar("Result")
RoomNow = Callable[[], Awaitable[Room]]


class HubReader:
    """Asks one hub, on threads: a hub that is slow takes none of the shared pool.

    `room` is asked for the memory that is free now; `connect` makes a client, which reads the
    user's token, and blocks.
    """

    def __init__(
        self,
        backends: Mapping[str, Backend],
        options: EngineOptions,
        room: RoomNow,
        connect: Callable[[], HubClient],
    ) -> None:
        self._backends = backends
        self._options = options
        self._room = room
        self._connect = connect

    async def plan(self, model: str, revision: str, name: str, folder: Path) -> DownloadJob:
        """Return the download of what a user means; see `router.job_service.Jobs.download`."""
        client = await self._in_thread(self._connect)
        if is_plain_address(model, client.endpoint):
            if revision or name:
                raise RequestError(
                    "revision and entry are for repositories of the hub, not for an address.",
                    param="revision" if revision else "entry",
                )
            url = model.strip()
            file = await self._in_thread(UrlSource(url).probe)
            return url_download(url, file, folder)
        reference = _reference(model, revision, client.endpoint)
        repository = await self._in_thread(
            lambda: read_repository(client, reference.repository, reference.revision or "main")
        )
        entries = meant_entries(repository, reference, name)
        entry = entries[0]
        if len(entries) > 1:
            chosen = await self._choose(client, repository, entries)
            if chosen.candidate is None:
                raise RequestError(
                    f"Nothing of {reference.repository} was chosen. {chosen.reason} Name an entry "
                    "to download it all the same.",
                    param="model",
                )
            entry = chosen.candidate.model.entry
        return repository_download(client.endpoint, reference, repository, entry, folder)

    async def _choose(
        self, client: HubClient, repository: HubRepository, entries: Sequence[HubEntry]
    ) -> HubChoice:
        candidates = await self._candidates(client, repository, DEFAULT_CONTEXT)
        meant = [one for one in candidates if one.model.entry in entries]
        return await self._in_thread(lambda: self._best(meant))

    async def _candidates(
        self, client: HubClient, repository: HubRepository, context_tokens: int
    ) -> list[Candidate]:
        """Return all models of a repository, each with whether it fits now."""
        room = await self._room()

        def inspect() -> list[Candidate]:
            inspector = Inspector(list(self._backends))
            try:
                return [
                    Candidate(
                        model, fit_of(model, self._backends, self._options, room, context_tokens)
                    )
                    for model in inspect_repository(client, repository, inspector.examine)
                ]
            finally:
                inspector.close()

        return await self._in_thread(inspect)

    def _best(self, candidates: Sequence[Candidate]) -> HubChoice:
        """Return the best of the candidates; blocks."""
        runnable = {name for name, one in self._backends.items() if one.availability().is_available}
        convertible = {}
        for one in candidates:
            info = one.model.info
            target = info and least_lossy_conversion(info, runnable)
            if target:
                convertible[one.model.entry.format] = target[0]
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
