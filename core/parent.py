"""Waits for the end of other processes, and ends this one with its parent."""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Sequence

_POLL_S = 1.0


def wait_for_exit(*pids: int) -> None:
    """Block until one of the processes has exited; they need not be children of this one.

    Uses no CPU while it waits: pidfds on Linux, a kqueue on macOS; a zombie has exited there.
    Where both are refused it asks once a second.  Sources: pidfd_open(2), kqueue(2) EVFILT_PROC.
    """
    try:
        if hasattr(os, "pidfd_open"):
            _wait_for_pidfds(pids)
            return
        if hasattr(select, "kqueue"):
            _wait_for_kqueue(pids)
            return
    except ProcessLookupError:
        return
    except PermissionError:
        pass
    while all(map(is_running, pids)):
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


def _wait_for_pidfds(pids: Sequence[int]) -> None:
    with contextlib.ExitStack() as stack:
        poll = select.poll()
        for pid in pids:
            descriptor = os.pidfd_open(pid)  # type: ignore[attr-defined,unused-ignore]
            stack.callback(os.close, descriptor)
            poll.register(descriptor, select.POLLIN)
        poll.poll()


def _wait_for_kqueue(pids: Sequence[int]) -> None:
    queue = select.kqueue()  # type: ignore[attr-defined,unused-ignore]
    try:
        events = [
            select.kevent(  # type: ignore[attr-defined,unused-ignore]
                pid,
                filter=select.KQ_FILTER_PROC,  # type: ignore[attr-defined,unused-ignore]
                flags=select.KQ_EV_ADD | select.KQ_EV_ONESHOT,  # type: ignore[attr-defined,unused-ignore]
                fflags=select.KQ_NOTE_EXIT,  # type: ignore[attr-defined,unused-ignore]
            )
            for pid in pids
        ]
        found = queue.control(events, 1, None)[0]
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


def kill_group_with_parent(parent: int) -> None:
    """From now on, kill this process's group when the process `parent`, its parent, exits.

    A forked process watches: a thread could not while native code keeps the interpreter's lock.
    Call it before other threads start, in a process that leads its group (`Child` makes it so).
    The watcher also ends with this process.
    """
    if os.getppid() != parent:
        # It exited before this process began to watch.
        os.killpg(os.getpgrp(), signal.SIGKILL)
    worker = os.getpid()
    if os.fork():
        return
    try:
        # The parent must see the end of the pipes when the worker exits.
        os.closerange(0, 3)
        wait_for_exit(parent, worker)
    finally:
        os.killpg(os.getpgrp(), signal.SIGKILL)
        os._exit(1)
