"""Waits for the end of another process, and ends this one with its parent."""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable

_POLL_S = 1.0


def wait_for_exit(pid: int) -> None:
    """Block until the process `pid` has exited; it need not be a child of this one.

    Uses no CPU while it waits: a pidfd on Linux, a kqueue on macOS; a zombie has exited there.
    Where both are refused it asks once a second.  Sources: pidfd_open(2), kqueue(2) EVFILT_PROC.
    """
    try:
        if hasattr(os, "pidfd_open"):
            _wait_for_pidfd(pid)
            return
        if hasattr(select, "kqueue"):
            _wait_for_kqueue(pid)
            return
    except ProcessLookupError:
        return
    except PermissionError:
        pass
    while is_running(pid):
        time.sleep(_POLL_S)


def is_running(pid: int) -> bool:
    """Return whether a process has this id; a zombie counts as running."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _wait_for_pidfd(pid: int) -> None:
    descriptor = os.pidfd_open(pid)  # type: ignore[attr-defined,unused-ignore]
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.poll()
    finally:
        os.close(descriptor)


def _wait_for_kqueue(pid: int) -> None:
    queue = select.kqueue()  # type: ignore[attr-defined,unused-ignore]
    try:
        event = select.kevent(  # type: ignore[attr-defined,unused-ignore]
            pid,
            filter=select.KQ_FILTER_PROC,  # type: ignore[attr-defined,unused-ignore]
            flags=select.KQ_EV_ADD | select.KQ_EV_ONESHOT,  # type: ignore[attr-defined,unused-ignore]
            fflags=select.KQ_NOTE_EXIT,  # type: ignore[attr-defined,unused-ignore]
        )
        (found,) = queue.control([event], 1, None)
        # With room for an event, an error is one as well.
        if found.flags & select.KQ_EV_ERROR:  # type: ignore[attr-defined,unused-ignore]
            raise OSError(found.data, os.strerror(found.data))
    finally:
        queue.close()


def exit_with_parent(grace_s: float, before: Callable[[], None] = lambda: None) -> None:
    """From now on, end this process when its parent exits; a thread watches.

    `before` is called first; then SIGTERM is sent, and after `grace_s` seconds the process exits
    with code 1.
    """
    parent = os.getppid()

    def watch() -> None:
        # A parent that has been replaced by init has exited before the wait began.
        if os.getppid() == parent:
            wait_for_exit(parent)
        with contextlib.suppress(Exception):
            before()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace_s)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
