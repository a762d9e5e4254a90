"""Ends a macOS process that still holds models without the destructors of native libraries.

llama.cpp's destructors abort a process whose models were not freed, for example after an error or
a forced stop; macOS then says that Python quit unexpectedly.  Source: ggml-metal-device.m, the
assertion that no residency sets are left; llama.cpp issues 19206 and 26857.
"""

import atexit
import ctypes
import sys
from functools import cache

_held: set[int] = set()


def hold(handle: int) -> None:
    """Note a native object that must be freed before the process's destructors run."""
    _held.add(handle)
    if sys.platform == "darwin":
        _register()


def let_go(handle: int) -> None:
    """Note that a native object was freed; idempotent."""
    _held.discard(handle)


@cache
def _register() -> None:
    atexit.register(_skip_destructors)


def _skip_destructors() -> None:
    """Let the C library's `exit` end in `_exit`, if anything is held.

    Called by Python's exit, after its other threads and before its finalization.  The process's
    exit code is 1 after an exception that nobody caught, else 0.  Source: __cxa_atexit of the
    Itanium C++ ABI: functions registered last run first, so before destructors of libraries.
    """
    if not _held:
        return
    library = ctypes.CDLL(None)
    end = ctypes.cast(library._exit, ctypes.c_void_p)
    code = ctypes.c_void_p(1 if hasattr(sys, "last_value") else 0)
    library.__cxa_atexit(end, code, ctypes.c_void_p(None))
