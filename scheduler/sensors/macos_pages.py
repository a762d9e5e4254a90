"""Reads how much memory other applications leave on a Mac; needs no root."""

import ctypes
from functools import cache

_LIBRARY = "/usr/lib/libSystem.B.dylib"
# Source: mach/host_info.h, HOST_VM_INFO64; mach/vm_statistics.h, struct vm_statistics64, which
# begins with free_count, active_count, inactive_count and wire_count, 32 bits each.
_HOST_VM_INFO64 = 4
_PAGE_COUNTS = 4
# Longer than any known vm_statistics64, which is 38: the kernel writes what it has and says so.
# Source: mach/mach_host.defs and osfmk/kern/host.c of xnu 11417; 256 is the most it takes.
_MOST_WORDS = 256


def available_bytes() -> int:
    """Return the bytes that models could take without pressing other applications into swap.

    Free pages, inactive ones, and half of the active ones, of which the system can compress or
    write out the least used.  Source: oMLX, whose ceiling follows the same sum.  Raises OSError,
    AttributeError.
    """
    free, active, inactive, _ = _page_counts()
    return (free + inactive + active // 2) * _page_bytes()


def _page_counts() -> tuple[int, ...]:
    """Return the pages that are free (with speculative ones), active, inactive and wired."""
    words = (ctypes.c_uint32 * _MOST_WORDS)()
    count = ctypes.c_uint32(_MOST_WORDS)
    status = _library().host_statistics64(
        _host(), ctypes.c_int(_HOST_VM_INFO64), words, ctypes.byref(count)
    )
    if status or count.value < _PAGE_COUNTS:
        raise OSError(f"host_statistics64 failed with status {status}, {count.value} words")
    return tuple(words[:_PAGE_COUNTS])


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(_LIBRARY)


@cache
def _host() -> ctypes.c_uint32:
    """Return the host's port, once in a process: each call adds a reference to it."""
    library = _library()
    library.mach_host_self.restype = ctypes.c_uint32
    return ctypes.c_uint32(library.mach_host_self())


@cache
def _page_bytes() -> int:
    """Return the kernel's size of a page, in which it counts."""
    size = ctypes.c_size_t()
    status = _library().host_page_size(_host(), ctypes.byref(size))
    if status or not size.value:
        raise OSError(f"host_page_size failed with status {status}")
    return size.value
