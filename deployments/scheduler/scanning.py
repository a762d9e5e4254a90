"""Scans the model folders: one scan at a time, shared by concurrent callers."""

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress

from backends.base import Backend
from catalog.bin import purge_expired
from catalog.last_scan import LastScan
from catalog.models import ScanReport
from catalog.scan.inspector import Inspector
from catalog.scan.places import model_folders, own_folders
from catalog.scan.scan import scan
from catalog.scan.walk import has_changed
from catalog.scan.watch import FolderWatch
from catalog.store import CatalogStore
from core.errors import CatalogNotWritten, ImpetusError
from core.settings import Settings
from core.supervision import Supervisor, attempt, call_in_thread

logger = logging.getLogger(__name__)

# A request for an unknown name starts a scan at most this often, unless files were added.
RESCAN_INTERVAL_S = 10.0
# The pause between two scans for added files.
ADDED_INTERVAL_S = 1.0
_MOST_URGENT = 100
# Requests wait no longer for a scan, which a disk may hold up for ever.
_WAIT_LIMIT_S = 60.0
# A scan for files that are arriving comes a little after they can be quiet.
_QUIET_MARGIN_S = 0.1
# How long a request waits for the times of the folders, which a disk may hold up for ever.
_LOOK_LIMIT_S = 2.0
# A scan for files that changed comes this much later than the last one, and ten times its duration.
CHANGED_INTERVAL_S = 3.0
_CHANGED_PAUSE = 10
# While the folders are watched the others scan as often: it looks for what gave no event.
WATCHED_INTERVAL_S = 3600.0
# The first pause after a failed scan; it doubles up to the setting's interval.
_RETRY_S = 2.0


class Scanner:
    """Updates the catalog.  Belongs to one event loop; files are read on a thread of its own.

    A scan goes on when its caller is cancelled, so two never run at once.  `on_change` is called
    after each that changed the catalog.
    """

    def __init__(
        self,
        settings: Settings,
        store: CatalogStore,
        backends: Mapping[str, Backend],
        supervisor: Supervisor,
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_change = on_change
        self._version = self._told_version = -1
        self._settings = settings
        self._store = store
        self._backends = backends
        self._supervisor = supervisor
        self._clock = clock
        self._task: asyncio.Task[None] | None = None
        self._began_at = 0.0
        self._next_rescan_at = 0.0
        self._ended_at = 0.0
        self._failures = 0
        self._report = ScanReport()
        self._last = LastScan()
        self._woken = asyncio.Event()
        self._look: asyncio.Task[None] | None = None
        self._has_added = False
        self._has_failed_backup = False
        self._has_failed_watch = False
        self._is_watching = False
        self._first_scan = asyncio.Event()
        self._urgent: set[str] = set()
        self.problem = ""

    @property
    def has_scanned(self) -> bool:
        """Whether a scan has succeeded since the start."""
        return self._first_scan.is_set()

    async def run(self) -> None:
        """Scan at intervals until cancelled; a scan that fails is repeated sooner.

        While `watch` watches the folders it only looks whether files were added to them.
        """
        while True:
            # Without scans what is in the catalog is still served.
            await attempt(self._scan_or_raise, is_vital=False)
            while await self._is_woken(self._pause_s()) or await self._is_idle():
                # Another scan found files that are arriving, or nothing has to be scanned.
                pass

    async def _is_idle(self) -> bool:
        """Whether the folders are watched and no scan is due."""
        is_due = self._failures or self._report.next_look_s is not None
        is_due = is_due or self._clock() - self._ended_at >= WATCHED_INTERVAL_S
        if is_due or not self._is_watching or self._report.has_unread:
            return False
        folders = self._report.folders
        return not await call_in_thread("impetus-look", lambda: has_changed(folders))

    async def watch(self) -> None:
        """Scan when files below the folders change, until cancelled.

        Where the system gives no events, the scans of `run` are all there are.
        """
        while True:
            try:
                watch = await call_in_thread("impetus-watch", self._start_watch)
            except (OSError, RuntimeError) as problem:
                if not self._has_failed_watch:
                    logger.warning(
                        "the model folders are scanned every %g s only, because they cannot be "
                        "watched for changes: %s",
                        self._settings.scan_interval_s,
                        problem,
                    )
                self._has_failed_watch = True
                await asyncio.sleep(self._settings.scan_interval_s)
                continue
            self._is_watching = True
            try:
                await self._scan_changed(watch)
            finally:
                self._is_watching = False
                watch.stop()

    def _start_watch(self) -> FolderWatch:
        return FolderWatch(model_folders(self._settings))

    async def _scan_changed(self, watch: FolderWatch) -> None:
        """Scan at the start of a watch and after changes, until the folders are others."""
        while True:
            began_at = self._clock()
            await self.scan(limit_s=None)
            took_s = self._clock() - began_at
            await asyncio.sleep(max(CHANGED_INTERVAL_S, _CHANGED_PAUSE * took_s))
            # Changes meanwhile are kept, and told at once.
            if not await call_in_thread("impetus-watch", lambda: self._await_change(watch)):
                return

    def _await_change(self, watch: FolderWatch) -> bool:
        """Block until something changes; False if the folders are others than those watched."""
        while watch.covers(model_folders(self._settings)):
            if watch.wait(self._settings.scan_interval_s, time.monotonic):
                return True
            if watch.is_stopped:
                return False
        return False

    async def _is_woken(self, pause_s: float) -> bool:
        """Wait for `pause_s`; return True if a scan found files that are arriving meanwhile."""
        self._woken.clear()
        try:
            async with asyncio.timeout(pause_s):
                await self._woken.wait()
        except TimeoutError:
            return False
        return True

    async def wait_first(self) -> None:
        """Return once a scan has succeeded."""
        await self._first_scan.wait()

    async def scan(self, limit_s: float | None = _WAIT_LIMIT_S) -> None:
        """Scan the folders; a scan that starts after this call serves it as well.

        Returns after `limit_s` if a disk hangs.  Never raises: `problem` says why the last scan
        failed, if it did.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self._newer_scan()

    async def _newer_scan(self) -> None:
        asked_at = self._clock()
        while True:
            running = self._task
            if running is None or running.done():
                running = self._task = self._supervisor.run_once("folder scan", self._scan_once())
                self._began_at = self._clock()
            is_new_enough = self._began_at >= asked_at
            await asyncio.wait({running})
            if is_new_enough:
                return

    async def rescan(self, urgent: str = "") -> None:
        """Scan for a name that the catalog does not know; shares a scan that runs.

        That one may have read a folder before a file was added to it.  Starts one at most every
        10 s; in between only if files were added to the folders, then at most every second, and
        else returns at once.  `urgent` is the path of a file whose inspection failed: the next scan
        inspects it, whenever that was.
        """
        if urgent and len(self._urgent) < _MOST_URGENT:
            self._urgent.add(urgent)
        if self._task is not None and not self._task.done():
            _, running = await asyncio.wait({self._task}, timeout=_WAIT_LIMIT_S)
            if not running:
                await self._scan_added()
            return
        if self._clock() < self._next_rescan_at:
            await self._scan_added()
            return
        self._next_rescan_at = self._clock() + RESCAN_INTERVAL_S
        try:
            await self.scan()
        finally:
            self._next_rescan_at = self._clock() + RESCAN_INTERVAL_S

    async def _scan_added(self) -> None:
        """Scan if files were added to the folders since the last scan."""
        folders = self._report.folders
        if self._look is None or self._look.done():
            self._look = self._supervisor.run_once("folder look", self._look_for_added())
        await asyncio.wait({self._look}, timeout=_LOOK_LIMIT_S)
        if not self._has_added:
            return
        pause_s = self._ended_at + ADDED_INTERVAL_S - self._clock()
        if pause_s > 0:
            await asyncio.sleep(min(pause_s, ADDED_INTERVAL_S))
        if self._report.folders is folders:
            await self.scan()

    async def _look_for_added(self) -> None:
        folders = self._report.folders
        self._has_added = False
        self._has_added = await call_in_thread("impetus-look", lambda: has_changed(folders))

    async def _scan_or_raise(self) -> None:
        # A scan of large folders may take long.
        await self.scan(limit_s=None)
        if self.problem:
            raise RuntimeError(f"scanning the model folders failed: {self.problem}")

    async def _scan_once(self) -> None:
        urgent, self._urgent = frozenset(self._urgent), set()
        try:
            report = await call_in_thread("impetus-scan", lambda: self._scan(urgent))
        except Exception as problem:
            self._urgent |= urgent
            self._failures += 1
            self.problem = str(problem) or type(problem).__name__
            if self._failures == 1:
                logger.error(
                    "scanning the model folders failed; the catalog is unchanged: %s",
                    self.problem,
                    exc_info=not isinstance(problem, ImpetusError),
                )
            if isinstance(problem, CatalogNotWritten):
                # What it holds already is served meanwhile.
                self._first_scan.set()
            return
        self._failures, self.problem = 0, ""
        self._report, self._ended_at = report, self._clock()
        if report.next_look_s is not None:
            self._woken.set()
        self._first_scan.set()
        if self._version != self._told_version:
            self._told_version = self._version
            self._on_change()
        if report.has_changes:
            logger.info("scan: %s", report)

    def _pause_s(self) -> float:
        interval_s = self._settings.scan_interval_s
        if not self._failures:
            soon_s = self._report.next_look_s
            return interval_s if soon_s is None else min(interval_s, soon_s + _QUIET_MARGIN_S)
        return float(min(interval_s, _RETRY_S * 2.0 ** min(self._failures - 1, 30)))

    def _scan(self, urgent: Collection[str]) -> ScanReport:
        inspector = Inspector(list(self._backends))
        try:
            backends = list(self._backends.values())
            report = scan(
                self._settings,
                self._store,
                backends,
                identify_file=inspector.examine,
                urgent=urgent,
                last=self._last,
            )
            self._version = self._store.data_version()
            self._back_up()
            self._purge_bin()
            return report
        finally:
            inspector.close()

    def _purge_bin(self) -> None:
        """Delete what has been in the bin for a day."""
        for entry in purge_expired(own_folders(self._settings), time.time()):
            logger.info("%s was purged from the bin: %d bytes", entry.model_id, entry.size_bytes)

    def _back_up(self) -> None:
        """Back the catalog up; it is served without that as well."""
        try:
            self._store.back_up()
        except (ImpetusError, OSError, sqlite3.Error) as problem:
            if not self._has_failed_backup:
                logger.warning("the catalog cannot be backed up: %s", problem)
            self._has_failed_backup = True
        else:
            self._has_failed_backup = False
