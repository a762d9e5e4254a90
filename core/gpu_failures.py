"""Finds macOS' reports of failures of Apple's GPU driver: kernel panics and restarts of the GPU."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

_REPORTS = Path("Library", "Logs", "DiagnosticReports")
_MOST_REPORTS = 16
_REPORT_BYTES = 65_536
# Where the driver's sources panicked.  The driver's name alone stands in every report, in its list
# of kernel extensions.  Source: ml-explore/mlx issues 3186 and 3346.
_PANICKED_IN = re.compile(rb"@IOGPU\w*\.cpp")


def is_gpu_panic(path: Path) -> bool:
    """Whether a `.panic` file tells of the GPU's driver; False if it cannot be read."""
    try:
        with path.open("rb") as file:
            return _PANICKED_IN.search(file.read(_REPORT_BYTES)) is not None
    except OSError:
        return False


def gpu_failures(top: Path = Path("/")) -> list[str]:
    """Return what failed since this Mac started and what to do, a sentence each; blocks shortly.

    macOS writes the report of a panic while it starts again.  Empty on other systems, and where
    the reports cannot be read.
    """
    if sys.platform != "darwin":
        return []
    # The doctor uses the rest of this module before anything is installed.
    import psutil

    started = psutil.boot_time()
    folder = top / _REPORTS
    panics = [path for path in _newest(folder, "*.panic", started) if is_gpu_panic(path)]
    restarts = _newest(folder, "gpuEvent-[Pp]ython*.ips", started)
    found = []
    if panics:
        found.append(
            f"This Mac was restarted because Apple's GPU driver failed ({panics[0].name}). Models "
            "that fill the memory and long contexts can cause that: lower IMPETUS_MEMORY_BUDGET or "
            "IMPETUS_CONTEXT_LENGTH, and send the report of scripts/doctor."
        )
    if restarts:
        found.append(
            f"Apple's GPU driver restarted the GPU while Python used it ({restarts[0].name}). "
            "Lower IMPETUS_PREFILL_CHUNK_TOKENS, and send the report of scripts/doctor."
        )
    return found


def reports_since(folder: Path, pattern: str, since: float) -> Iterator[tuple[float, Path]]:
    """Yield the time and path of the files of `folder` that were written after `since`."""
    for path in folder.glob(pattern):
        try:
            written = path.stat().st_mtime
        except OSError:
            continue
        if written >= since:
            yield written, path


def _newest(folder: Path, pattern: str, since: float) -> list[Path]:
    """Return the reports after `since`, newest first, at most 16."""
    found = sorted(reports_since(folder, pattern, since), reverse=True)
    return [path for _, path in found[:_MOST_REPORTS]]
