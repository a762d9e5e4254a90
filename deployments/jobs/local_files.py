"""Local folders to choose models from, and what an import of one is to do."""

import asyncio
import os
import re
import secrets
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from catalog.added_folders import added_folders, remove_folder
from catalog.scan.places import model_folders
from catalog.uploads.arrival import Arrival
from catalog.uploads.browse import Entry, Listing, allowed, browse, browse_root, roots
from catalog.uploads.names import checked_name, is_junk, name_of_file, unusable
from catalog.uploads.store import UploadStore
from core.errors import ImpetusError, NotFound, RequestError, Unavailable
from core.settings import Settings
from core.supervision import call_in_thread
from router.upload_service import (
    FolderEntry,
    FolderListing,
    ImportHow,
    ModelFolder,
    ModelFolders,
)

Result = TypeVar("Result")

_LIMIT_S = 5.0
_ROOT_LIMIT_S = 1.0
# Threads that wait for disks which do not answer; each ends when its disk does.
_MOST_WAITING = 32
_CACHED = re.compile(r"models--[^/]+--([^/]+)")


class LocalFiles:
    """Looks at the disks on threads, for a limited time; for one event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._uploads = UploadStore(settings.home)
        self._waiting = 0

    async def browse(self, path: str) -> FolderListing:
        """Return what is in a folder; see `router.upload_service.LocalFiles`."""
        if not path:
            return await self._roots()
        found = await self._look(lambda: browse(path, roots(self._settings)))
        return _shown(found)

    async def _roots(self) -> FolderListing:
        """Return the folders where one may begin, without those that do not answer."""
        wanted = await self._look(lambda: roots(self._settings))
        found = await asyncio.gather(*(self._root(root) for root in wanted))
        entries = tuple(_entry(one) for one in found if one is not None)
        return FolderListing(path=None, parent=None, entries=entries, is_truncated=False)

    async def _root(self, root: Path) -> Entry | None:
        with suppress(Unavailable):
            return await self._look(lambda: browse_root(root), _ROOT_LIMIT_S)
        return None

    async def plan(self, path: str, how: ImportHow, name: str) -> Arrival:
        """Return the import of a folder or file.

        Raises RequestError, PermissionDenied, NotFound, UploadConflict, Unavailable.
        """
        return await self._look(lambda: self._plan(path, how, name))

    def _plan(self, path: str, how: ImportHow, name: str) -> Arrival:
        sources = roots(self._settings)
        real = allowed(path, sources)
        mode = os.lstat(real).st_mode
        if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            raise RequestError(f"{path[:200]!r} is not a folder or a file.", param="path")
        if how == "in_place":
            if not stat.S_ISDIR(mode):
                raise RequestError(
                    f"{path[:200]!r} is a file, but folders are used in place: give its folder, "
                    "all models in which are then listed, or import it by clone or copy.",
                    param="path",
                )
            return Arrival(secrets.token_hex(16), real.name, how, str(real))
        if stat.S_ISREG(mode) and (reason := unusable(Path(path).name)):
            raise RequestError(f"{path[:200]!r} is not taken: {reason}.", param="path")
        chosen = checked_name(name or _usual_name(Path(path), real, is_file=stat.S_ISREG(mode)))
        self._uploads.check_name(chosen, self._uploads.uploads())
        # The name of a link to a file in a cache tells more than that of its target.
        source = _link_of(Path(path), sources) if stat.S_ISREG(mode) else None
        return Arrival(secrets.token_hex(16), chosen, how, str(source or real))

    async def model_folders(self) -> ModelFolders:
        """Return the folders that are scanned."""
        return await self._look(self._model_folders)

    def _model_folders(self) -> ModelFolders:
        added = set(added_folders(self._settings))
        return ModelFolders(
            folders=tuple(
                ModelFolder(path=_text(folder), is_added=folder in added)
                for folder in model_folders(self._settings)
            )
        )

    async def remove_model_folder(self, path: str) -> ModelFolders:
        """Scan an added folder no more.  Raises NotFound."""

        def remove() -> ModelFolders:
            if not remove_folder(self._settings, Path(path)):
                raise NotFound(
                    f"{path[:200]!r} was not added by an import; other folders are those of "
                    "IMPETUS_MODELS_PATH and IMPETUS_DISCOVER.",
                    param="path",
                )
            return self._model_folders()

        return await self._look(remove)

    async def _look(self, function: Callable[[], Result], limit_s: float = _LIMIT_S) -> Result:
        """Call a function that uses a disk.  Raises Unavailable if that does not answer."""
        if self._waiting >= _MOST_WAITING:
            raise Unavailable(
                f"{self._waiting} looks at disks wait already; a network disk may not answer.",
                retry_after_s=5,
            )
        self._waiting += 1
        task = asyncio.ensure_future(call_in_thread("impetus-files", function))
        task.add_done_callback(self._has_ended)
        done, _ = await asyncio.wait({task}, timeout=limit_s)
        if not done:
            raise Unavailable(
                f"The disk did not answer within {limit_s:g} s; if it is a network disk, check its "
                "connection.",
                retry_after_s=5,
            )
        return task.result()

    def _has_ended(self, task: "asyncio.Future[Result]") -> None:
        self._waiting -= 1
        # What comes too late has no reader.
        if not task.cancelled():
            task.exception()


def _usual_name(path: Path, real: Path, *, is_file: bool) -> str:
    """Return the name of the folder or file; in a Hugging Face cache that of the repository."""
    for part in (*path.parts, *real.parts):
        if (match := _CACHED.fullmatch(part)) is not None:
            return match[1]
    name = path.name if not is_junk(path.name) else real.name
    return name_of_file(name) if is_file else name


def _link_of(path: Path, sources: Sequence[Path]) -> Path | None:
    """Return a file's path in its own folder, None if that may not be looked at."""
    with suppress(ImpetusError):
        return allowed(str(path.parent), sources) / path.name
    return None


def _shown(found: Listing) -> FolderListing:
    return FolderListing(
        path=_text(found.path),
        parent=_text(found.parent) if found.parent else None,
        entries=tuple(_entry(one) for one in found.entries),
        is_truncated=found.is_truncated,
    )


def _entry(one: Entry) -> FolderEntry:
    return FolderEntry(
        name=_text(one.name),
        path=_text(one.path),
        is_folder=one.is_folder,
        size_bytes=one.size_bytes,
        modified_at=one.modified,
    )


def _text(path: Path | str) -> str:
    """Return a path as text that JSON can hold, whatever bytes it has."""
    return os.fsencode(path).decode("utf-8", "replace")
