"""Scans the model folders: one scan at a time, shared by concurrent callers."""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress

from backends.base import Backend
from catalog.models import ScanReport
from catalog.scan.inspector import Inspector
from catalog.scan.scan import scan
from catalog.store import CatalogStore
from core.errors import CatalogNotWritten, ImpetusError
from core.settings import Settings
from core.supervision import Supervisor, attempt, call_in_thread

logger = logging.getLogger(__name__)

# A request for an unknown name starts a scan at most this often.
RESCAN_INTERVAL_S = 10.0
_MOST_URGENT = 100
# Requests wait no longer for a scan, which a disk may hold up for ever.
_WAIT_LIMIT_S = 60.0
# The first pause after a failed scan; it doubles up to the setting's interval.
_RETRY_S = 2.0


class Scanner:
    """Updates the catalog.  Belongs to one event loop; files are read on a thread of its own.

    A scan goes on when its caller is cancelled, so two never run at once.
    """

    def __init__(
        self,
        settings: Settings,
        store: CatalogStore,
        backends: Mapping[str, Backend],
        supervisor: Supervisor,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._store = store
        self._backends = backends
        self._supervisor = supervisor
        self._clock = clock
        self._task: asyncio.Task[None] | None = None
        self._began_at = 0.0
        self._next_rescan_at = 0.0
        self._failures = 0
        self._first_scan = asyncio.Event()
        self._urgent: set[str] = set()
        self.problem = ""

    @property
    def has_scanned(self) -> bool:
        """Whether a scan has succeeded since the start."""
        return self._first_scan.is_set()

    async def run(self) -> None:
        """Scan at intervals until cancelled; a scan that fails is repeated sooner."""
        while True:
            # Without scans what is in the catalog is still served.
            await attempt(self._scan_or_raise, is_vital=False)
            await asyncio.sleep(self._pause_s())

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

        Starts one at most every 10 s and returns at once in between.  `urgent` is the path of a
        file whose inspection failed: the next scan inspects it, whenever that was.
        """
        if urgent and len(self._urgent) < _MOST_URGENT:
            self._urgent.add(urgent)
        if self._task is not None and not self._task.done():
            await asyncio.wait({self._task}, timeout=_WAIT_LIMIT_S)
            return
        if self._clock() < self._next_rescan_at:
            return
        self._next_rescan_at = self._clock() + RESCAN_INTERVAL_S
        try:
            await self.scan()
        finally:
            self._next_rescan_at = self._clock() + RESCAN_INTERVAL_S

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
        self._first_scan.set()
        if report.has_changes:
            logger.info("scan: %s", report)

    def _pause_s(self) -> float:
        interval_s = self._settings.scan_interval_s
        if not self._failures:
            return interval_s
        return float(min(interval_s, _RETRY_S * 2.0 ** min(self._failures - 1, 30)))

    def _scan(self, urgent: Collection[str]) -> ScanReport:
        inspector = Inspector(list(self._backends))
        try:
            backends = list(self._backends.values())
            return scan(
                self._settings,
                self._store,
                backends,
                identify_file=inspector.examine,
                urgent=urgent,
            )
        finally:
            inspector.close()
