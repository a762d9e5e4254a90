"""Reads the catalog for jobs: models by name, and what a scan found of a result."""

import asyncio
import logging
import os
import time
from pathlib import Path

from catalog.models import Converted, ModelRecord
from catalog.store import CatalogStore
from core.errors import (
    BrokenModel,
    ImpetusError,
    ModelFileMissing,
    ModelNotFound,
    Unavailable,
)
from core.supervision import call_in_thread
from deployments.serve.handles import Handle, call, direct

logger = logging.getLogger(__name__)

# A scan of large folders may take long; the job is done all the same.
_SCAN_LIMIT_S = 60.0
# A scan lists no file that was written within the last 3 s.
_REGISTER_LIMIT_S = 15.0
_REGISTER_POLL_S = 1.0
_UNREAD_RETRY_S = 10


class CatalogReader:
    """Reads the catalog on threads; it is opened when it is first needed.

    For one event loop.  `scheduler` scans the folders.
    """

    def __init__(self, path: Path, scheduler: Handle) -> None:
        self._path = path
        self._scheduler = direct(scheduler)
        self._store: CatalogStore | None = None

    async def register(self, folder: Path) -> None:
        """Have the folders scanned until the catalog has the model; else a later scan finds it.

        Raises BrokenModel if the scan refused all that is in the folder.
        """
        end = time.monotonic() + _REGISTER_LIMIT_S
        while True:
            await self._rescan(folder)
            found = await self.records_in(folder)
            if found or time.monotonic() >= end:
                break
            await asyncio.sleep(_REGISTER_POLL_S)
        if found and all(record.state == "refused" for record in found):
            raise BrokenModel(f"{folder.name} cannot be used here: {found[0].reason}")

    async def records_in(self, folder: Path) -> list[ModelRecord]:
        """Return what the catalog has of a folder; nothing while it cannot be read."""

        def read() -> list[ModelRecord]:
            real = os.path.realpath(folder)
            return [
                record for record in self._open().models() if Path(record.key).is_relative_to(real)
            ]

        try:
            return await call_in_thread("impetus-catalog", read)
        except ImpetusError as problem:
            logger.warning("the catalog cannot be read: %s", problem.message)
            return []

    async def records(self) -> list[ModelRecord]:
        """Return all models.  Raises ImpetusError."""
        return await call_in_thread("impetus-catalog", lambda: self._open().models())

    async def source(self, name: str) -> ModelRecord:
        """Return the model that a name means as the source of a conversion.

        Of several variants that is the largest original.  Raises ModelNotFound, BrokenModel,
        ModelFileMissing, Unavailable for one that is not inspected yet.
        """

        def read() -> ModelRecord:
            found = self._open().resolve(name)
            if not found:
                raise ModelNotFound.of(name, [])
            originals = [one for one in found if not isinstance(one.source, Converted)]
            return max(originals or found, key=lambda one: (one.state == "ok", one.info.size_bytes))

        record = await call_in_thread("impetus-catalog", read)
        _check(record)
        return record

    async def _rescan(self, folder: Path) -> None:
        try:
            async with asyncio.timeout(_SCAN_LIMIT_S):
                await call(self._scheduler.rescan.remote())
        except (ImpetusError, TimeoutError) as problem:
            logger.warning("the folders are not scanned for %s yet: %r", folder.name, problem)

    def _open(self) -> CatalogStore:
        if self._store is None:
            self._store = CatalogStore(self._path)
        return self._store

    def close(self) -> None:
        """Close the catalog; may be called twice."""
        if self._store is not None:
            self._store.close()
            self._store = None


def _check(record: ModelRecord) -> None:
    if record.state == "refused":
        raise BrokenModel(f"{record.id} was refused: {record.reason}", param="model")
    if record.state == "missing":
        raise ModelFileMissing(
            f"The file of {record.id} is gone; put it back or choose another model.", param="model"
        )
    if record.state == "uninspected":
        raise Unavailable(
            f"{record.id} cannot be converted yet: {record.reason}. Its file is inspected again; "
            "try again later.",
            param="model",
            retry_after_s=_UNREAD_RETRY_S,
        )
