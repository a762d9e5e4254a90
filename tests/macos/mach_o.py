"""Reads what Mach-O files say of themselves: processor, oldest macOS, and linked libraries.

Source: mach-o/loader.h and mach-o/fat.h.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

ARM64 = 0x0100000C
_FAT, _THIN = 0xCAFEBABE, 0xFEEDFACF
_VERSION_MIN_MACOSX, _BUILD_VERSION = 0x24, 0x32
# LC_LOAD_DYLIB, its weak form and its re-exporting form.
_LOADS = (0x0C, 0x80000018, 0x8000001F)


@dataclass(frozen=True, slots=True)
class Slice:
    """The part of a file for one processor; `macos` is the oldest major version it runs on."""

    processor: int
    macos: int
    libraries: tuple[str, ...]


def read_slices(path: Path) -> list[Slice]:
    """Return the 64-bit parts of a Mach-O file; an empty list for other files."""
    with path.open("rb") as file:
        head = file.read(4096)
        if len(head) < 32:
            return []
        offsets = [0]
        # Java's class files begin alike, with a version above 40 in place of the number of parts.
        if struct.unpack(">I", head[:4])[0] == _FAT and (count := _u32_big(head, 4)) < 20:
            offsets = [_u32_big(head, 8 + 20 * index + 8) for index in range(count)]
        found = []
        for offset in offsets:
            file.seek(offset)
            header = file.read(32)
            if len(header) == 32 and struct.unpack("<I", header[:4])[0] == _THIN:
                size = struct.unpack("<I", header[20:24])[0]
                found.append(_slice(header, file.read(size)))
        return found


def _u32_big(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 4], "big")


def _slice(header: bytes, commands: bytes) -> Slice:
    processor, count = struct.unpack("<4xI8xI12x", header)
    macos, libraries, place = 0, [], 0
    for _ in range(count):
        kind, size = struct.unpack_from("<II", commands, place)
        if kind == _BUILD_VERSION:
            macos = struct.unpack_from("<I", commands, place + 12)[0] >> 16
        elif kind == _VERSION_MIN_MACOSX:
            macos = struct.unpack_from("<I", commands, place + 8)[0] >> 16
        elif kind in _LOADS:
            name = commands[place + struct.unpack_from("<I", commands, place + 8)[0] : place + size]
            libraries.append(name.rstrip(b"\0").decode())
        place += size
    return Slice(processor, macos, tuple(libraries))
