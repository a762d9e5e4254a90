"""Command line of the soak test, `scripts/soak`."""

import argparse
import asyncio
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx

from core.cpus import usable_cpus
from core.keys import MANAGEMENT_TOKEN, read_key
from scripts.bench_lib.servers import free_port
from scripts.bench_lib.starter import starter_model
from scripts.soak_lib.clients import Outcome, Pause, run_client
from scripts.soak_lib.gaps import CONTROL, MOST, measure_gaps
from scripts.soak_lib.kills import Kill, kill_one, kinds
from scripts.soak_lib.samples import Sample, take_sample, trends
from scripts.soak_lib.server import Metrics, Server, SoakError, read_metrics, running
from scripts.soak_lib.verdict import Accounts, Verdict, judge

_SAMPLE_S = 10.0
_QUIET_LIMIT_S = 240.0
_CONTEXT = "1024"
_SEQUENCES = "4"


@dataclass
class Records:
    """What a run recorded."""

    outcomes: list[Outcome] = field(default_factory=list)
    kills: list[Kill] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def note(self, outcome: Outcome) -> None:
        """Keep an outcome; one that may turn out to be a fault is shown at once."""
        self.outcomes.append(outcome)
        if not outcome.is_right and outcome.status != 429:
            say(f"{outcome.kind}: {outcome.status} {outcome.code} {outcome.message}")


def main() -> int:
    """Run the soak test; return 1 if something went wrong."""
    options = _parser().parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        chosen = [] if options.no_kills else kinds(options.kill)
        with tempfile.TemporaryDirectory(prefix="soak-", dir="/tmp") as folder:
            verdict = _soak(Path(folder), options, chosen)
    except (SoakError, ValueError) as problem:
        sys.stderr.write(f"{problem}\n")
        return 1
    for line in verdict.lines:
        sys.stdout.write(f"{line}\n")
    for fault in verdict.faults:
        sys.stdout.write(f"FAULT {fault}\n")
    sys.stdout.write("FAILED\n" if verdict.faults else "PASSED\n")
    return 1 if verdict.faults else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    add = parser.add_argument
    add("--minutes", type=float, default=30.0, help="duration (default: 30)")
    add("--clients", type=int, default=16, help="concurrent clients (default: 16)")
    add("--seed", type=int, default=1, help="of the clients' choices (default: 1)")
    add("--model", type=Path, action="append", default=[], help="GGUF file; give three or more")
    add("--kill", action="append", default=[], help="kind of process; repeatable; default: all")
    add("--gaps", action="store_true", help="only measure an innocent stream's gaps")
    add("--no-kills", action="store_true", help="kill nothing")
    return parser


def _soak(folder: Path, options: argparse.Namespace, chosen: Sequence[str]) -> Verdict:
    settings = {
        "IMPETUS_FORMATS": "gguf",
        "IMPETUS_CONTEXT_LENGTH": _CONTEXT,
        "IMPETUS_MAX_SEQUENCES": _SEQUENCES,
        "IMPETUS_PREFIX_RAM": "64MiB",
        "IMPETUS_PREFIX_DISK": "128MiB",
    }
    server = Server(folder / "home", folder / "models", free_port(), settings)
    server.home.mkdir()
    server.models.mkdir()
    _place_models(options.model, server.models)
    with running(server):
        models, budget = asyncio.run(_budget_for_all_but_one(server))
    say(f"models: {', '.join(models)}; memory budget {budget >> 20} MiB")
    server.members.clear()
    server.settings = {**settings, "IMPETUS_MEMORY_BUDGET": str(budget)}
    if options.gaps:
        return _gaps(server, models[0], options.seed)
    records = Records()
    with running(server):
        accounts = asyncio.run(_drive(server, models, options, chosen, records))
    verdict = judge(records.outcomes, records.kills, trends(records.samples), accounts)
    left = server.survivors()
    if left:
        verdict.faults.append(f"{len(left)} processes outlived the server: {left}")
    return verdict


def _gaps(server: Server, model: str, seed: int) -> Verdict:
    """Return the longest gaps of an innocent stream beside each kind of pathological request."""
    verdict = Verdict()
    # One processor is left for what handles the other requests; else every one delays a step.
    server.settings = {**server.settings, "IMPETUS_THREADS": str(max(1, usable_cpus() - 1))}
    with running(server):
        for gap in asyncio.run(measure_gaps(server.url, model, seed)):
            line = (
                f"{gap.kind} ({gap.status}): longest gap {gap.longest_s * 1000:.0f} ms, "
                f"{gap.ratio:.1f} times the median step"
            )
            verdict.lines.append(line)
            if gap.ratio > MOST and gap.kind != CONTROL:
                verdict.faults.append(line)
    return verdict


def _place_models(given: Sequence[Path], folder: Path) -> None:
    """Put the models into the folder: those given, or three copies of the starter."""
    starter = starter_model()
    if given:
        sources = [(path.resolve(), path.name) for path in given]
    elif starter is not None:
        sources = [(starter, f"soak-{name}-135m-q4_1.gguf") for name in ("one", "two", "three")]
    else:
        raise SoakError("The starter model is not installed; give models with --model.")
    if len(sources) < 2:
        raise SoakError("Give at least two models with --model.")
    for source, name in sources:
        shutil.copyfile(source, folder / name)


async def _budget_for_all_but_one(server: Server) -> tuple[list[str], int]:
    """Load every model; return their ids and a budget that holds all but one of them."""
    async with httpx.AsyncClient(base_url=server.url, timeout=240, trust_env=False) as client:
        count = len(list(server.models.iterdir()))
        models: list[str] = []
        for _ in range(240):
            listed = (await client.get("/v1/models")).json()["data"]
            models = [one["id"] for one in listed if "chat" in one.get("capabilities", ())]
            if len(models) >= count:
                break
            await asyncio.sleep(0.5)
        else:
            raise SoakError(f"{len(models)} of {count} models can chat; the soak test needs all.")
        for model in models:
            token = {"x-impetus-token": read_key(server.home, MANAGEMENT_TOKEN)}
            answer = await client.post(f"/api/models/{model}/load", json={}, headers=token)
            if answer.status_code != 200:
                raise SoakError(f"{model} cannot be loaded: {answer.text}")
            await client.post("/v1/chat/completions", json=_short(model))
        metrics = await read_metrics(client)
    held = metrics.values("impetus_model_resident_bytes")
    # Room for what measurements add later, but never for all of them.
    room = sum(held.values()) - 0.6 * min(held.values())
    return models, int(room)


def _short(model: str) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


async def _drive(
    server: Server,
    models: Sequence[str],
    options: argparse.Namespace,
    chosen: Sequence[str],
    records: Records,
) -> Accounts:
    """Let the clients work while processes are killed; return the memory figures at the end."""
    pause = Pause()
    pause.end()
    clients = [
        asyncio.create_task(
            run_client(number, server.url, models, pause, records.note, options.seed)
        )
        for number in range(options.clients)
    ]
    sampler = asyncio.create_task(_sample(server, records))
    end = time.monotonic() + options.minutes * 60
    every_s = options.minutes * 60 / (len(chosen) + 1)
    try:
        for number, kind in enumerate(chosen, 1):
            await asyncio.sleep(max(0.0, end - (len(chosen) + 1 - number) * every_s - _now()))
            killed = await kill_one(server, kind, _short(models[0]))
            if killed is None:
                say(f"no process of this kind: {kind}")
                continue
            say(f"killed {kind}: {replace(killed, at=0.0)}")
            records.kills.append(killed)
        await asyncio.sleep(max(0.0, end - _now()))
        pause.begin()
        sampler.cancel()
        return await _accounts(server)
    finally:
        for task in (*clients, sampler):
            task.cancel()
        await asyncio.gather(*clients, sampler, return_exceptions=True)


def _now() -> float:
    return time.monotonic()


async def _sample(server: Server, records: Records) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=30, trust_env=False) as client:
        while True:
            # While a part restarts there is nothing to compare.
            with suppress(httpx.HTTPError):
                metrics = await read_metrics(client)
                sample = await asyncio.to_thread(take_sample, server, metrics)
                records.samples.append(sample)
                say(f"{len(records.outcomes)} requests; {replace(sample, at=0.0)}")
            await asyncio.sleep(_SAMPLE_S)


async def _accounts(server: Server) -> Accounts:
    """Wait until nothing runs; return the ledger's figures and the processes' own."""
    async with httpx.AsyncClient(base_url=server.url, timeout=30, trust_env=False) as client:
        limit = _now() + _QUIET_LIMIT_S
        while True:
            metrics = await read_metrics(client)
            if _is_quiet(metrics):
                break
            if _now() > limit:
                raise SoakError("Requests still run long after the last client left.")
            await asyncio.sleep(1.0)
        # The scheduler samples the processes every few seconds.
        await asyncio.sleep(15.0)
        metrics = await read_metrics(client)
    return Accounts(
        metrics.values("impetus_model_resident_bytes"),
        metrics.values("impetus_model_measured_bytes"),
        metrics.value("impetus_memory_budget_bytes"),
    )


def _is_quiet(metrics: Metrics) -> bool:
    names = ("impetus_engine_running_sequences", "impetus_engine_waiting_requests")
    counts = [sum(metrics.values(name).values()) for name in names]
    return not any(counts)


def say(line: str) -> None:
    """Print a line of progress."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")


if __name__ == "__main__":
    sys.exit(main())
