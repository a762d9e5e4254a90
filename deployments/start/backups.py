"""Keeps caches out of Time Machine's backups and Spotlight's index on macOS."""

import ctypes
import logging
import os
import plistlib
import sys
from pathlib import Path

from core.files import why

logger = logging.getLogger(__name__)

_LIBRARY = "/usr/lib/libSystem.B.dylib"
# What `tmutil addexclusion` sets; it moves with the folder and needs no privilege.
# Source: tmutil(8) and its attribute's value, a property list of the string com.apple.backupd.
_ATTRIBUTE = b"com.apple.metadata:com_apple_backup_excludeItem"
_VALUE = plistlib.dumps("com.apple.backupd", fmt=plistlib.FMT_BINARY)
_NOT_INDEXED = ".metadata_never_index"


def keep_out_of_backups(folder: Path) -> None:
    """Create `folder`, and exclude it from backups and the index on macOS; never raises.

    A cache is made again when it is lost, and changes with every request.
    """
    if sys.platform != "darwin":
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _NOT_INDEXED).touch()
        exclude_from_backups(folder)
    except (OSError, AttributeError) as problem:
        reason = why(problem) if isinstance(problem, OSError) else problem
        logger.info("%s stays in backups: %s", folder, reason)


def exclude_from_backups(folder: Path) -> None:
    """Set the attribute that Time Machine reads.  Raises OSError, AttributeError.

    Source: setxattr(2) of macOS, with a position and options after the size.
    """
    library = ctypes.CDLL(_LIBRARY, use_errno=True)
    status = library.setxattr(
        os.fsencode(folder),
        _ATTRIBUTE,
        _VALUE,
        ctypes.c_size_t(len(_VALUE)),
        ctypes.c_uint32(0),
        ctypes.c_int(0),
    )
    if status:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
