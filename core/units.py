"""Parses and formats byte counts such as `12GiB`."""

import re

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

_BYTE_UNITS = {
    "": 1, "b": 1,
    "k": KIB, "kb": 1000, "kib": KIB,
    "m": MIB, "mb": 1000**2, "mib": MIB,
    "g": GIB, "gb": 1000**3, "gib": GIB,
    "t": 1024 * GIB, "tb": 1000**4, "tib": 1024 * GIB,
}  # fmt: skip
_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(text: str | int) -> int:
    """Parse `12884901888`, `12GiB`, `12 GB` or `1.5g` (a bare letter is binary) into bytes.

    Raises ValueError for anything else, including a sign.
    """
    if isinstance(text, int):
        if text < 0:
            raise ValueError(f"a byte count cannot be negative: {text}; write 12GiB, 500MB or 0")
        return text
    match = _BYTES.fullmatch(text)
    if match is None or match[2].lower() not in _BYTE_UNITS:
        raise ValueError(f"{text!r} is not a byte count; write 12GiB, 500MB or a plain number")
    return int(float(match[1]) * _BYTE_UNITS[match[2].lower()])


def format_bytes(count: int) -> str:
    """Format `count` bytes for users, in binary units: `93.8 MiB`."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
