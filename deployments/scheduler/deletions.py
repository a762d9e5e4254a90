"""Deletes models into the bin and restores them, and finds moved files; not while in use."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from catalog import bin as model_bin
from catalog.locate import find_moved
from catalog.models import ModelRecord
from catalog.scan.places import model_folders, own_folders
from catalog.store import CatalogStore
from core.errors import ImpetusError, ModelInUse, ModelNotFound
from core.settings import Settings
from deployments.messages import BinEntry
from deployments.scheduler.ledger import Ledger

logger = logging.getLogger(__name__)


class Deletions:
    """Owns the bin.  Belongs to one event loop; files are moved on threads, one model at a time."""

    def __init__(
        self,
        settings: Settings,
        store: CatalogStore,
        ledgers: Callable[[], Sequence[Ledger]],
        release: Callable[[str, str], Awaitable[Any]],
        is_converted: Callable[[str], bool],
        scan: Callable[[], Awaitable[None]],
    ) -> None:
        """`is_converted` tells whether a conversion reads the model; `scan` scans the folders."""
        self._settings = settings
        self._store = store
        self._ledgers = ledgers
        self._release = release
        self._is_converted = is_converted
        self._scan = scan
        self._one_at_a_time = asyncio.Lock()

    async def delete(self, model_id: str) -> BinEntry:
        """Unload the model and move its files into the bin, where they stay for a day.

        Of a model whose files are gone the entry is removed at once, and the bin has nothing.
        Raises ModelNotFound, RequestError for a model whose files are not the user's own,
        ModelInUse while a request, a load or a conversion uses it, and Unavailable.
        """
        async with self._one_at_a_time:
            records = await asyncio.to_thread(self._store.models)
            record = next((one for one in records if one.id == model_id), None)
            if record is None:
                raise ModelNotFound.of(model_id, [one.id for one in records])
            if record.state == "missing":
                return await self._forget(record)
            root = await asyncio.to_thread(self._check_deletable, record)
            await self._check_unused(model_id)
            await self._release(model_id, "the model is being deleted")
            entry = await asyncio.to_thread(
                model_bin.move_to_bin, record, root, records, time.time()
            )
            # A scan that saw the files before has ended then, and adds no entry again.
            await self._scan()
            forget = partial(self._store.record_scan, (), (), [record.key], now=time.time())
            await asyncio.to_thread(forget)
        logger.info("%s was moved to the bin: %d bytes", model_id, entry.size_bytes)
        return entry

    async def _forget(self, record: ModelRecord) -> BinEntry:
        """Remove the entry of a model whose files are gone, also for the next scan."""
        await self._check_unused(record.id)
        await self._release(record.id, "the model is being deleted")
        now = time.time()
        forget = partial(self._store.record_scan, (), (), [record.key], now=now)
        await asyncio.to_thread(forget)
        logger.info("%s, whose files are gone, was removed", record.id)
        return BinEntry("", record.id, "", (), 0, now, now, record.aliases, {})

    async def locate(self, model_id: str, path: str) -> None:
        """Give a missing model its files at another place, which a scan finds first.

        Its id, settings and aliases stay, and its former bare name becomes an alias if that is
        free.  Raises ModelNotFound, RequestError if the files are not those of the model,
        ModelInUse while they are used as another model.
        """
        async with self._one_at_a_time:
            await self._scan()
            records = await asyncio.to_thread(self._store.models)
            folders = await asyncio.to_thread(model_folders, self._settings)
            found = await asyncio.to_thread(find_moved, model_id, Path(path), records, folders)
            if found.id == model_id:
                return
            await self._check_unused(found.id)
            for each in (model_id, found.id):
                await self._release(each, f"its files are found again as {model_id}")
            await asyncio.to_thread(self._store.adopt, model_id, found.id)
            former = next(one.info.name for one in records if one.id == model_id)
            await asyncio.to_thread(self._keep_name, former, model_id)
        logger.info("%s was found again at %s", model_id, found.key)

    def _keep_name(self, name: str, model_id: str) -> None:
        if not self._store.resolve(name):
            # A name that is not a valid alias is not kept.
            with suppress(ImpetusError):
                self._store.set_alias(name, model_id)

    def _check_deletable(self, record: ModelRecord) -> Path:
        return model_bin.check_deletable(record, own_folders(self._settings))

    def _find(self, entry_id: str) -> BinEntry:
        return model_bin.find(entry_id, own_folders(self._settings))

    async def _check_unused(self, model_id: str) -> None:
        if self._is_converted(model_id):
            raise ModelInUse(f"{model_id} is being converted; try again when that has ended.")
        for ledger in self._ledgers():
            await ledger.refresh()
            resident = ledger.state.resident(model_id)
            in_flight = resident.in_flight if resident is not None else 0
            waiting = sum(one.model_id == model_id for one in ledger.state.waiting)
            if in_flight or waiting or ledger.state.is_loading(model_id):
                raise ModelInUse(
                    f"{model_id} is in use: {in_flight} of its requests run and {waiting} wait. "
                    "Try again when they have ended."
                )

    async def entries(self) -> list[BinEntry]:
        """Return what is in the bin, oldest first."""
        return await asyncio.to_thread(lambda: model_bin.entries(own_folders(self._settings)))

    async def restore(self, entry_id: str) -> BinEntry:
        """Move a model's files back, with its settings and those aliases that are free.

        Raises NotFound, RequestError if another file has its place, and Unavailable.
        """
        async with self._one_at_a_time:
            entry = await asyncio.to_thread(self._find, entry_id)
            await asyncio.to_thread(model_bin.restore, entry)
            await self._scan()
            await asyncio.to_thread(self._describe_again, entry)
        return entry

    def _describe_again(self, entry: BinEntry) -> None:
        try:
            taken = {alias.lower() for alias in self._store.aliases()}
            for alias in entry.aliases:
                if alias.lower() not in taken:
                    self._store.set_alias(alias, entry.model_id)
            self._store.change_settings(entry.model_id, entry.settings)
        except (ImpetusError, TypeError) as problem:
            logger.warning("%s was restored without all its settings: %s", entry.model_id, problem)

    async def purge(self, entry_id: str) -> BinEntry:
        """Delete a model in the bin for good.  Raises NotFound and Unavailable."""
        async with self._one_at_a_time:
            entry = await asyncio.to_thread(self._find, entry_id)
            await asyncio.to_thread(model_bin.purge, entry)
        return entry
