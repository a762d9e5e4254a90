"""Measures the catalog: scans of 5,000 files, queries of 10,000 models, and an idle server."""

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import psutil

from catalog.models import ScannedModel, ScanReport, record_key
from catalog.store import CatalogStore
from core.settings import Settings
from scripts.bench_lib.library import FILES, write_library
from scripts.bench_lib.report.figures import Verdict
from scripts.bench_lib.rounds import say
from scripts.bench_lib.servers import (
    OURS,
    ROOT,
    BenchError,
    Server,
    free_port,
    launch,
    stop,
    wait_until_ready,
)

RECORDS = 10_000
MAX_WARM_S = 5.0
MAX_UNCHANGED_CPU_MS = 50.0
MAX_QUERY_MS = 20.0
# What an idle server may use more because of its folder: the measurement's own noise.
MAX_IDLE_CPU_S = 0.2
CATALOG_HEAD = ("what", "wall", "CPU")
QUERIES = (
    "limit=50",
    "format=gguf&capability=chat&state=available&sort=-size&limit=50",
    "text=publisher-1&min_bytes=1000000&sort=added&limit=50",
    "tag=work&favourite=true&sort=name&limit=50",
)
_FORMATS = ["gguf", "mlx", "safetensors", "onnx", "pytorch", "coreml"]
_QUIET_S = 3.5
_QUERY_ROUNDS = 20
_FILL_LIMIT_S = 300.0
# Longer than the pause after a scan that found changes.
_SETTLE_S = 15.0
# Runs one scan in a process that has just started, as after a restart.
_SCAN = "import sys; from scripts.bench_lib.catalog import print_scan; print_scan(sys.argv[1:])"


@dataclass(frozen=True, slots=True)
class Measured:
    """One thing that was measured, in seconds."""

    name: str
    wall_s: float
    cpu_s: float


@dataclass(frozen=True, slots=True)
class CatalogResult:
    """All measurements; `idle_cpu_s` are of the server without and with the folder."""

    scans: Sequence[Measured]
    queries: Sequence[Measured]
    idle_cpu_s: tuple[float, float] | None


def measure_catalog(rounds: int, idle_s: float) -> CatalogResult:
    """Scan, ask and wait; `idle_s` 0 leaves the servers out.  Raises BenchError."""
    with tempfile.TemporaryDirectory(prefix="impetus-bench-") as kept:
        home = Path(kept) / "home"
        library = write_library(home / "models", FILES)
        say(f"{library.files:,} files of {library.models:,} models")
        # Files that were written within the last seconds are still arriving.
        time.sleep(_QUIET_S)
        scans = _scans(home, library.models, rounds)
        queries = asyncio.run(_queries(Path(kept) / "queries", home, rounds))
        idle = None
        if idle_s:
            cpu = [_idle_cpu_s(Path(kept) / name, folder, idle_s) for name, folder in
                   (("without", Path(kept) / "none"), ("with", home / "models"))]  # fmt: skip
            idle = cpu[0], cpu[1]
    return CatalogResult(scans, queries, idle)


def _scans(home: Path, models: int, rounds: int) -> list[Measured]:
    """Scan for the first time, in new processes, and again in one of them."""
    cold, *_ = _scan_in_process(home, 1)
    if cold["added"] != models:
        raise BenchError(f"the scan found {cold['added']:,} of {models:,} models")
    warm, unchanged = [], []
    for _ in range(rounds):
        first, *others = _scan_in_process(home, 3)
        warm.append(first)
        unchanged += others
    return [
        _median("first scan, every file inspected", [cold]),
        _median("scan of a new process", warm),
        _median("scan when nothing changed", unchanged),
    ]


def _median(name: str, found: Sequence[Mapping[str, float]]) -> Measured:
    middle = {
        key: sorted(one[key] for one in found)[len(found) // 2] for key in ("wall_s", "cpu_s")
    }
    return Measured(name, middle["wall_s"], middle["cpu_s"])


def _scan_in_process(home: Path, count: int) -> list[dict[str, float]]:
    done = subprocess.run(
        [sys.executable, "-c", _SCAN, str(home), str(count)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    if done.returncode:
        raise BenchError(f"the scan failed: {done.stderr.strip()[-500:]}")
    found: list[dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def print_scan(arguments: Sequence[str]) -> None:
    """Scan `arguments[1]` times, and print what each took as JSON; for a process of its own."""
    from backends.registry import load_backends
    from catalog.last_scan import LastScan
    from catalog.scan.inspector import Inspector
    from catalog.scan.scan import scan

    settings = _settings(Path(arguments[0]))
    known = load_backends()
    backends = [known[name] for name in settings.formats if name in known]
    store = CatalogStore(settings.catalog_file)
    last = LastScan()
    found = []
    for _ in range(int(arguments[1])):
        inspector = Inspector([backend.name for backend in backends])
        wall, cpu = time.monotonic(), time.process_time()
        report: ScanReport = scan(
            settings, store, backends, identify_file=inspector.examine, last=last
        )
        taken = {"wall_s": time.monotonic() - wall, "cpu_s": time.process_time() - cpu}
        inspector.close()
        found.append({**taken, "added": len(report.added)})
    store.close()
    sys.stdout.write(json.dumps(found) + "\n")


def _settings(home: Path) -> Settings:
    return Settings(home=home, starters=False, discover=[], formats=_FORMATS)


async def _queries(home: Path, scanned: Path, rounds: int) -> list[Measured]:
    """Ask the application, in this process, over a catalog of 10,000 models."""
    from deployments.decisions import DecisionLog
    from deployments.router.catalog import CatalogView
    from deployments.router.management import SchedulerManagement
    from deployments.router.model_states import ModelStatesWatch
    from router.app import create_app
    from router.services import Services

    settings = _settings(home)
    _fill(settings, scanned)
    handle: Any = _Scheduler()
    unused: Any = None
    view = CatalogView(settings, handle, ModelStatesWatch(handle), unused)
    management = SchedulerManagement(settings, handle, DecisionLog())
    services = Services(settings, view, unused, unused, unused, management)
    transport = httpx.ASGITransport(create_app(services))
    found = []
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        found.append(await _asked(http, "first query of a new process", QUERIES[0], 1))
        for query in QUERIES:
            count = _QUERY_ROUNDS * rounds
            found.append(await _asked(http, f"query `{query}`", query, count))
        known = (await http.get("/api/models?limit=1")).json()["models"][0]["id"]
        await management.change_settings(known, {"notes": "changed"})
        found.append(await _asked(http, "first query after a change", QUERIES[0], 1))
    view.close()
    management.close()
    return found


async def _asked(http: httpx.AsyncClient, name: str, query: str, count: int) -> Measured:
    """Send a query, and return the median of what the answers took."""
    taken = []
    for _ in range(count):
        wall, cpu = time.monotonic(), time.process_time()
        answer = await http.get(f"/api/models?{query}")
        taken.append({"wall_s": time.monotonic() - wall, "cpu_s": time.process_time() - cpu})
        if answer.status_code != 200:
            raise BenchError(f"{query}: {answer.status_code} {answer.text[:200]}")
    return _median(name, taken)


def _fill(settings: Settings, scanned: Path) -> None:
    """Write 10,000 records into a catalog: those of the scanned one, again under other paths."""
    store = CatalogStore(_settings(scanned).catalog_file)
    records = store.models()
    store.close()
    target = CatalogStore(settings.catalog_file)
    models = []
    for number in range(RECORDS):
        record = records[number % len(records)]
        copy = number // len(records)
        info = replace(
            record.info,
            name=f"{record.info.name}-{copy}",
            files=tuple(Path("/library") / str(copy) / file.name for file in record.info.files),
        )
        models.append(
            ScannedModel(
                replace(info, files=(Path(f"{record_key(info)}.{number}"),)),
                record.source,
                f"1:{number}",
            )
        )
    target.record_scan(models, (), (), now=time.time())
    for number, known in enumerate(target.models()[:200]):
        target.change_settings(known.id, {"tags": ["work"], "favourite": number % 2 == 0})
    target.close()


class _Scheduler:
    """The handle of a scheduler with nothing loaded."""

    def options(self, **_: Any) -> "_Scheduler":
        return self

    def __getattr__(self, name: str) -> "_Scheduler":
        return self

    async def _states(self) -> Any:
        from deployments.messages import ModelStates

        return ModelStates(version=1)

    def remote(self, *_: Any) -> Any:
        return self._states()


def _idle_cpu_s(home: Path, models: Path, seconds: float) -> float:
    """Return the CPU seconds that all processes of an idle server use; `models` is watched."""
    models.mkdir(parents=True, exist_ok=True)
    home.mkdir()
    log, port = home / "launch.log", free_port()
    formats = {"IMPETUS_FORMATS": ",".join(_FORMATS)}
    process = launch(home, models, port, formats, log)
    server = Server(OURS, port, "", process.pid, is_ours=True)
    try:
        wait_until_ready(server, process, log, "/readyz")
        _wait_until_quiet(server)
        before = _tree_cpu_s(process.pid)
        time.sleep(seconds)
        return _tree_cpu_s(process.pid) - before
    finally:
        stop(process)


def _wait_until_quiet(server: Server) -> None:
    """Wait until the catalog is filled and its first scan is over; then a little longer."""
    known = -1
    end = time.monotonic() + _FILL_LIMIT_S
    while time.monotonic() < end:
        found = json.loads(server.get("/api/models?limit=1"))["total"]
        if found == known:
            break
        known = found
        time.sleep(_SETTLE_S)
    time.sleep(_SETTLE_S)


def _tree_cpu_s(pid: int) -> float:
    root = psutil.Process(pid)
    total = 0.0
    for process in [root, *root.children(recursive=True)]:
        with suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def catalog_rows(result: CatalogResult) -> list[tuple[str, ...]]:
    """Return the table's rows."""
    return [
        (one.name, f"{one.wall_s * 1000:,.1f} ms", f"{one.cpu_s * 1000:,.1f} ms")
        for one in (*result.scans, *result.queries)
    ]


def catalog_verdicts(result: CatalogResult) -> list[Verdict]:
    """Return whether scans, queries and an idle server stay within their limits."""
    _, warm, unchanged = result.scans
    slowest = max(one.wall_s for one in result.queries[1:-1]) * 1000
    found = [
        _verdict("scan of 5,000 files, new process", f"< {MAX_WARM_S:g} s", warm.wall_s,
                 MAX_WARM_S, "s"),
        _verdict("scan of 5,000 files, nothing changed: CPU", f"≤ {MAX_UNCHANGED_CPU_MS:g} ms",
                 unchanged.cpu_s * 1000, MAX_UNCHANGED_CPU_MS, "ms"),
        _verdict("query of 10,000 models, the slowest", f"< {MAX_QUERY_MS:g} ms", slowest,
                 MAX_QUERY_MS, "ms"),
    ]  # fmt: skip
    if result.idle_cpu_s is not None:
        without, with_folder = result.idle_cpu_s
        found.append(
            _verdict(
                "idle server, CPU more with 5,000 watched files",
                f"≤ {MAX_IDLE_CPU_S:g} s",
                with_folder - without,
                MAX_IDLE_CPU_S,
                f"s ({with_folder:.2f} s, without {without:.2f} s)",
            )
        )
    return found


def _verdict(name: str, target: str, value: float, limit: float, unit: str) -> Verdict:
    return Verdict(f"Catalog: {name}", target, f"{value:.2f} {unit}", value <= limit)
