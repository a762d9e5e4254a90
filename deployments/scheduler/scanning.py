"""Scans the model folders: one scan at a time, shared by concurrent callers."""

import asyncio
import logging
import time
from collections.abc import Mapping

from backends.base import Backend
from catalog.models import ScanReport
from catalog.scan.inspector import Inspector
from catalog.scan.scan import scan
from catalog.store import CatalogStore
from core.settings import Settings

logger = logging.getLogger(__name__)


class Scanner:
    """Updates the catalog.  Belongs to one event loop; files are read on a thread."""

    def __init__(
        self, settings: Settings, store: CatalogStore, backends: Mapping[str, Backend]
    ) -> None:
        self._settings = settings
        self._store = store
        self._backends = backends
        self._one_at_a_time = asyncio.Lock()
        self._began_at = 0.0

    async def scan(self) -> None:
        """Scan the folders; a scan that starts after this call serves it as well."""
        asked_at = time.monotonic()
        async with self._one_at_a_time:
            if self._began_at > asked_at:
                return
            self._began_at = time.monotonic()
            try:
                report = await asyncio.to_thread(self._scan)
            except Exception:
                logger.exception("scanning the model folders failed; the catalog is unchanged")
                return
            if report.has_changes:
                logger.info("scan: %s", report)

    def _scan(self) -> ScanReport:
        inspector = Inspector(list(self._backends))
        try:
            backends = list(self._backends.values())
            return scan(self._settings, self._store, backends, identify_file=inspector.examine)
        finally:
            inspector.close()
