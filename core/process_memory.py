"""Reads the memory footprint of processes on macOS; notes the children that hold models."""

import ctypes
import sys

_LIBRARY = "/usr/lib/libproc.dylib"
# Source: libproc.h, proc_pid_rusage; sys/resource.h, RUSAGE_INFO_V2 and struct rusage_info_v2,
# whose ri_phys_footprint stands after a uuid of 16 bytes and seven 64-bit numbers.
_RUSAGE_INFO_V2 = 2
_RUSAGE_BYTES = 16 + 8 * 18
_FOOTPRINT_OFFSET = 16 + 8 * 7

_model_processes: set[int] = set()


def count_model_process(process_id: int) -> None:
    """Count a child that holds a model with the memory of this process."""
    _model_processes.add(process_id)


def forget_model_process(process_id: int) -> None:
    """Count a child no more, because it ended; idempotent."""
    _model_processes.discard(process_id)


def model_processes() -> tuple[int, ...]:
    """Return the ids of the children whose memory counts as this process's own."""
    return tuple(_model_processes)


def footprint_bytes(process_id: int) -> int | None:
    """Return what a process holds, as Activity Monitor shows it, Metal's buffers included.

    Needs no privilege for processes of the same user, unlike `task_for_pid`.  None if the process
    does not exist or the system does not tell.
    """
    try:
        return footprint_of(process_rusage(process_id))
    except (OSError, AttributeError):
        return None


def process_rusage(process_id: int) -> bytes:
    """Return a process's rusage_info_v2.  Raises OSError, AttributeError."""
    library = ctypes.CDLL(_LIBRARY, use_errno=True)
    buffer = ctypes.create_string_buffer(_RUSAGE_BYTES)
    if library.proc_pid_rusage(process_id, _RUSAGE_INFO_V2, ctypes.byref(buffer)):
        raise OSError(ctypes.get_errno(), "proc_pid_rusage failed")
    return buffer.raw


def footprint_of(rusage: bytes) -> int | None:
    """Return `ri_phys_footprint` of a rusage_info_v2; None if it is too short."""
    field = rusage[_FOOTPRINT_OFFSET : _FOOTPRINT_OFFSET + 8]
    return int.from_bytes(field, sys.byteorder) if len(field) == 8 else None
