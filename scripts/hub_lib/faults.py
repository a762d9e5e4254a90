"""The faults that the test hub can be told to have, by repository, file and number of times."""

import threading
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

KINDS = {
    "status": "answers with the status `value`; 429 and 503 with Retry-After `seconds`",
    "drop": "closes the connection without an answer",
    "stall": "sends `at` bytes of the body, then nothing for `seconds`",
    "slow": "sends `value` bytes in a second",
    "truncate": "closes the connection after `at` bytes of the body",
    "corrupt": "changes the byte `at` of the file",
    "ignore-range": "answers a Range request with the whole file and 200",
    "wrong-range": "answers a Range request with the bytes from the file's start",
    "html": "answers a file with a web page and 200",
    "etag": "answers a file with another ETag than the listing's",
    "size": "states sizes `value` bytes larger in listings and headers",
    "hash": "states another SHA-256 in listings and headers",
    "redirect": "redirects a file to the address `value`; `loop` for one that never ends",
    "move": "adds a commit to the repository before it answers",
}


@dataclass(slots=True)
class Fault:
    """One fault; `repository` and `file` are patterns as in a shell.

    `file` is also matched with the name of what else is asked for: `api` for model information,
    `tree` for listings, `search`.  `times` is how often it happens, None: always.
    """

    kind: str
    repository: str = "*"
    file: str = "*"
    at: int = 0
    value: str = ""
    seconds: float = 3600.0
    times: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"{self.kind!r} is not a fault; choose one of {', '.join(KINDS)}")


class Faults:
    """The faults that are switched on; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._active: list[Fault] = []

    def add(self, fault: Fault) -> None:
        """Switch a fault on."""
        with self._lock:
            self._active.append(fault)

    def clear(self) -> None:
        """Switch all faults off."""
        with self._lock:
            self._active.clear()

    def active(self) -> list[Fault]:
        """Return the faults that are switched on."""
        with self._lock:
            return list(self._active)

    def take(self, kinds: Collection[str], repository: str, file: str) -> dict[str, Fault]:
        """Return the faults of these kinds that happen now, by kind, and count them."""
        found: dict[str, Fault] = {}
        with self._lock:
            for fault in self._active:
                if fault.kind not in kinds or fault.kind in found or fault.times == 0:
                    continue
                if fnmatch(repository, fault.repository) and fnmatch(file, fault.file):
                    found[fault.kind] = fault
                    if fault.times is not None:
                        fault.times -= 1
        return found


def parse_fault(text: str) -> Fault:
    """Return the fault of `KIND[,NAME=VALUE...]`, such as `stall,file=*.gguf,at=1000`.

    Raises ValueError with the reason.
    """
    kind, *rest = text.split(",")
    values: dict[str, Any] = {}
    for part in rest:
        name, equals, value = part.partition("=")
        convert = _CONVERTERS.get(name)
        if convert is None or not equals:
            raise ValueError(f"{part!r} is not NAME=VALUE with one of {', '.join(_CONVERTERS)}")
        try:
            values[name] = convert(value)
        except ValueError:
            raise ValueError(f"{name} is {value!r}, which is not a number") from None
    return Fault(kind, **values)


_CONVERTERS = {
    "repository": str, "file": str, "value": str, "at": int, "times": int, "seconds": float,
}  # fmt: skip
