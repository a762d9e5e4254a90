"""Reads a zip archive's directory and one of its entries from a remote file, block by block."""

import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import BinaryIO

from core.units import KIB, MIB

_BLOCK_BYTES = 64 * KIB
# A longer directory is that of no model.
_MAX_READ_BYTES = 64 * MIB


@dataclass(slots=True)
class RangedFile:
    """A local file of a remote one's size, whose blocks are fetched before they are read.

    `fetch` writes the bytes from an offset on, of a number, into the local file; it blocks.
    """

    stream: BinaryIO
    size: int
    fetch: Callable[[int, int], None]
    _known: set[int] = field(default_factory=set)

    def read(self, count: int = -1) -> bytes:
        """Return the next bytes.  Raises BadZipFile for more than any directory has."""
        start = self.stream.tell()
        end = self.size if count < 0 else min(start + count, self.size)
        if end - start > _MAX_READ_BYTES:
            raise zipfile.BadZipFile("its directory is too large")
        if end > start:
            self._require(start // _BLOCK_BYTES, (end - 1) // _BLOCK_BYTES)
        return self.stream.read(max(end - start, 0))

    def _require(self, first: int, last: int) -> None:
        """Fetch the blocks that are missing, as one piece from the first to the last of them."""
        missing = [block for block in range(first, last + 1) if block not in self._known]
        if missing:
            start = missing[0] * _BLOCK_BYTES
            end = min((missing[-1] + 1) * _BLOCK_BYTES, self.size)
            self.fetch(start, end - start)
            self._known.update(range(missing[0], missing[-1] + 1))

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move to an offset; see `io.IOBase.seek`."""
        return self.stream.seek(offset, whence)

    def tell(self) -> int:
        """Return the offset of the next byte."""
        return self.stream.tell()

    def seekable(self) -> bool:
        """Whether `seek` works."""
        return True


def fetch_zip_entry(file: RangedFile, name: re.Pattern[str], longest: int) -> None:
    """Read the directory of an archive, and the entries called `name` of up to `longest` bytes.

    What is damaged is left to those who read the local file.  Raises what `fetch` raises.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                if name.fullmatch(entry.filename) and entry.file_size <= longest:
                    archive.read(entry)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError):
        return
