"""Simulated sensor: reads a thermal state's name from a file, for demonstrations and tests."""

import os
import stat
from pathlib import Path

from scheduler.thermal import Reading, SensorProblem, ThermalState

_MOST_BYTES = 64
_STATES = {state.label: state for state in ThermalState}


class FileSensor:
    """Reads the file anew each time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> Reading:
        """Return the state that the file names, in upper or lower case; other text is a problem."""
        try:
            text = self._text().strip().lower()
        except OSError as problem:
            return self._unknown(f"{self._path} cannot be read: {problem.strerror}")
        state = _STATES.get(text)
        if state is None:
            return self._unknown(f"{self._path} names no state: {text[:_MOST_BYTES]!r}")
        return Reading(state)

    def _text(self) -> str:
        # Opening a pipe must not wait for its writer.
        descriptor = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(0, "it is not a regular file")
            return os.read(descriptor, _MOST_BYTES).decode("utf-8", "replace")
        finally:
            os.close(descriptor)

    @staticmethod
    def _unknown(message: str) -> Reading:
        return Reading(problems=(SensorProblem("thermal file", message),))
