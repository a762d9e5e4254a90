"""Waits for changes in model folders by file-system events."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from catalog.scan.walk import is_partial

if TYPE_CHECKING:
    from watchfiles import Change

# What waits wakes as often, to see whether it shall stop; changes within it are one.
_STEP_MS = 1000
_LONGEST_MS = 3000


class FolderWatch:
    """Watches folders and everything below them, except what scans ignore.

    Belongs to one thread at a time.  Folders that do not exist are left out.  Network file systems
    may give no events.
    """

    def __init__(self, folders: Sequence[Path], step_ms: int = _STEP_MS) -> None:
        """Start watching.  Blocks while subfolders are listed.

        Raises OSError, also when the system's limit of watches is reached.
        """
        self._places = places(folders)
        self._roots = [Path(path) for path, _, _ in self._places]
        self._stop = threading.Event()
        self._has_lost_root = False
        self._changes: Iterator[object] | None = None
        if self._roots:
            self._changes = self._watched(step_ms)
            # The first result is that of the start.
            next(self._changes)

    def _watched(self, step_ms: int) -> Iterator[object]:
        # An import of 20 ms that tests of the scan do not need.
        from watchfiles import watch

        yield from watch(
            *self._roots,
            watch_filter=self._note,
            debounce=max(_LONGEST_MS * step_ms // _STEP_MS, 1),
            step=step_ms,
            rust_timeout=1,
            yield_on_timeout=True,
            stop_event=self._stop,
            raise_interrupt=False,
            ignore_permission_denied=True,
        )

    def wait(self, limit_s: float, clock: Callable[[], float]) -> bool:
        """Block until something changed; False after `limit_s`, and at once after `stop`."""
        end = clock() + limit_s
        if self._changes is None:
            self._stop.wait(limit_s)
            return False
        while not self._stop.is_set() and clock() < end:
            if next(self._changes, None):
                return True
        return False

    def stop(self) -> None:
        """End a `wait` within a second; may be called twice, from any thread."""
        self._stop.set()

    @property
    def is_stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stop.is_set()

    def covers(self, folders: Sequence[Path]) -> bool:
        """Whether these folders, as they are now, are the ones that are watched."""
        return not self._has_lost_root and self._places == places(folders)

    def _note(self, change: "Change", path: str) -> bool:
        """Return whether a change matters; a root that is deleted is not watched any more."""
        from watchfiles import Change

        if change is Change.deleted and Path(path) in self._roots:
            self._has_lost_root = True
        return self._matters(path)

    def _matters(self, path: str) -> bool:
        """Whether a scan would look at the path: not hidden, and no unfinished download."""
        for root in self._roots:
            if Path(path).is_relative_to(root):
                parts = Path(path).relative_to(root).parts
                return not any(part.startswith(".") or is_partial(part) for part in parts)
        return True


def places(folders: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Return the folders that exist, with device and inode: one made anew is another one."""
    found = []
    for folder in dict.fromkeys(os.path.realpath(folder) for folder in folders):
        try:
            status = os.stat(folder)
        except OSError:
            continue
        found.append((folder, status.st_dev, status.st_ino))
    return found
