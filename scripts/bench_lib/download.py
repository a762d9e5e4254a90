"""Compares downloads from the test hub with huggingface_hub's `snapshot_download`."""

import asyncio
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from catalog.hub.client import HubClient
from catalog.hub.download.job import DownloadJob
from catalog.hub.download.run import run_download
from catalog.hub.repository import read_repository
from core.units import MIB, format_bytes
from scripts.bench_lib.report.figures import Spread, Verdict, spread
from scripts.bench_lib.servers import OURS, ROOT, BenchError

PEER = "snapshot_download"
MIN_SPEED_RATIO = 0.9
MAX_CPU_RATIO = 1.2
FILE_BYTES = 192 * MIB
_FILES = 2
_SMALL_FILES = 10
_REPOSITORY = "bench/model"
_LIMIT_S = 300.0
_SNAPSHOT = (
    "import sys; from huggingface_hub import snapshot_download; "
    f"snapshot_download({_REPOSITORY!r}, local_dir=sys.argv[1], token=False)"
)
DOWNLOAD_HEAD = ("client", "MiB/s", "seconds", "CPU seconds")


@dataclass(frozen=True, slots=True)
class DownloadRun:
    """One download, with the start of its process: its duration and the CPU time of that."""

    seconds: float
    cpu_s: float


Runs = Mapping[str, Sequence[DownloadRun]]


def measure_downloads(
    rounds: int, names: Sequence[str] = (OURS, PEER), file_bytes: int = FILE_BYTES
) -> Runs:
    """Download the same repository in turns; the first of a round changes.  Raises BenchError."""
    results: dict[str, list[DownloadRun]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="impetus-bench-") as kept:
        source = _write_repository(Path(kept) / "source", file_bytes)
        with _hub(source) as endpoint:
            for number in range(rounds):
                for name in names if number % 2 == 0 else reversed(names):
                    target = Path(kept) / "target"
                    run = _ours if name == OURS else _snapshot
                    results[name].append(_timed(run, endpoint, target))
                    _check(source, target)
                    shutil.rmtree(target)
    return results


def download_rows(runs: Runs, size_bytes: int = _FILES * FILE_BYTES) -> list[tuple[str, ...]]:
    """Return the table's rows."""
    return [
        (
            name,
            _text([size_bytes / MIB / run.seconds for run in found], 0),
            _text([run.seconds for run in found], 2),
            _text([run.cpu_s for run in found], 2),
        )
        for name, found in runs.items()
    ]


def download_verdicts(runs: Runs) -> list[Verdict]:
    """Return whether ours is as fast as the peer, and needs no more CPU time, by round."""
    pairs = list(zip(runs.get(OURS, ()), runs.get(PEER, ()), strict=False))
    speed = spread([peer.seconds / ours.seconds for ours, peer in pairs])
    cpu = spread([ours.cpu_s / peer.cpu_s for ours, peer in pairs])
    return [
        Verdict(
            "Download: speed, ours / snapshot_download",
            f"≥ {MIN_SPEED_RATIO}",
            _shown(speed),
            None if speed is None else speed.median >= MIN_SPEED_RATIO,
        ),
        Verdict(
            "Download: CPU time, ours / snapshot_download",
            f"≤ {MAX_CPU_RATIO}",
            _shown(cpu),
            None if cpu is None else cpu.median <= MAX_CPU_RATIO,
        ),
    ]


def _text(values: Sequence[float], digits: int) -> str:
    return _shown(spread(values), digits)


def _shown(found: Spread | None, digits: int = 2) -> str:
    return found.text(digits) if found else "–"


def _write_repository(folder: Path, file_bytes: int) -> Path:
    """Write large files of random bytes, and small ones as beside a model."""
    folder.mkdir()
    for number in range(_FILES):
        name = f"model-{number + 1:05d}-of-{_FILES:05d}.safetensors"
        with (folder / name).open("wb") as stream:
            for start in range(0, file_bytes, MIB):
                stream.write(os.urandom(min(MIB, file_bytes - start)))
    for number in range(_SMALL_FILES):
        (folder / f"part_{number}.json").write_text("{}" * 500)
    return folder


@contextmanager
def _hub(source: Path) -> Iterator[str]:
    """Run the test hub in a process of its own; yield its address."""
    command = [sys.executable, "-m", "scripts.hub_lib", "--port=0"]
    with subprocess.Popen(
        [*command, f"--publish={_REPOSITORY}={source}"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as hub:
        try:
            assert hub.stdout is not None
            _, _, endpoint = hub.stdout.readline().strip().partition("=")
            if not endpoint:
                raise BenchError("the test hub did not start")
            # Hashes are computed once, before anything is measured.
            read_repository(HubClient(endpoint, token=""), _REPOSITORY)
            yield endpoint
        finally:
            hub.terminate()


def _timed(run: Callable[[str, Path], None], endpoint: str, target: Path) -> DownloadRun:
    """Run a download in a process of its own."""
    before, started = _children_cpu_s(), time.monotonic()
    run(endpoint, target)
    return DownloadRun(time.monotonic() - started, _children_cpu_s() - before)


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _ours(endpoint: str, target: Path) -> None:
    repository = read_repository(HubClient(endpoint, token=""), _REPOSITORY)
    job = DownloadJob(endpoint, _REPOSITORY, repository.commit, repository.files, target)
    asyncio.run(run_download(job, "", lambda _: None))


def _snapshot(endpoint: str, target: Path) -> None:
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", _SNAPSHOT, str(target)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
    )
    if done.returncode:
        raise BenchError(f"{PEER}: {done.stderr.strip()[-500:]}")


def _check(source: Path, target: Path) -> None:
    """Raise BenchError if a file is missing or has another size."""
    for path in source.iterdir():
        got = target / path.name
        if not got.is_file() or got.stat().st_size != path.stat().st_size:
            raise BenchError(f"{path.name} ({format_bytes(path.stat().st_size)}) did not arrive")
