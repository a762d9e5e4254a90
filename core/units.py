"""Parses and formats byte counts such as `12GiB`."""

import re
from decimal import Decimal

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
_BYTES = re.compile(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([a-zA-Z]*)\s*", re.ASCII)
_MOST_BYTES = 2**63 - 1
_SHOWN = 60


def parse_bytes(value: object) -> int:
    """Parse `12884901888`, `12GiB`, `12 GB` or `1.5g` (a bare letter is binary) into bytes.

    A float counts if it is a whole number, as YAML reads `1.5e+10`.  Raises ValueError for
    anything else, including a sign, and for more than 2^63 - 1.
    """
    count = _count(value)
    if count is None:
        shown = f"{value!r:.{_SHOWN}}"
        raise ValueError(f"{shown} is not a byte count; write 12GiB, 500MB or a plain number")
    if count < 0:
        raise ValueError(f"a byte count cannot be negative: {count}; write 12GiB, 500MB or 0")
    if count > _MOST_BYTES:
        raise ValueError("the byte count exceeds 8 EiB; write 12GiB, 500MB or a plain number")
    return count


def _count(value: object) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    match = _BYTES.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[2].lower() not in _BYTE_UNITS:
        return None
    return int(Decimal(match[1]) * _BYTE_UNITS[match[2].lower()])


def format_bytes(count: int) -> str:
    """Format `count` bytes for users, in binary units: `93.8 MiB`."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
