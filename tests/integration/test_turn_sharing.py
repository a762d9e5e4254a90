"""Two formats' engines in two processes: their steps never overlap, and a death frees the turn."""

import json
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import httpx

from deployments.replica.accelerator import turn_file
from tests.gguf_files import llama_gguf
from tests.integration.server import ROOT, STARTER, Server, wait_until

# Opens one model, generates when told, and says when each of its turns began and ended.
WORKER = """
import asyncio, json, sys, time
from contextlib import contextmanager
from pathlib import Path
from backends.base import EngineOptions
from backends.registry import backends_for
from backends.engine.accelerator_lock import AcceleratorLock, SharesAccelerator
from tests.requests import request, run, end_of

spans = []

class Noting(AcceleratorLock):
    @contextmanager
    def hold(self):
        with super().hold():
            began = time.monotonic_ns()
            if sys.argv[4] == "hold":
                print("holding", flush=True)
                time.sleep(600)
            try:
                yield
            finally:
                spans.append((began, time.monotonic_ns()))

async def main():
    lock = Noting(Path(sys.argv[1]))
    lock.register()
    backend = backends_for([sys.argv[2]])[sys.argv[2]]
    info = backend.identify(Path(sys.argv[3])) if sys.argv[3] else backend.built_in()[0]
    engine = backend.open(info, EngineOptions(threads=1, context_tokens=1024))
    assert isinstance(engine, SharesAccelerator)
    engine.share_accelerator(lock)
    print("ready", flush=True)
    sys.stdin.readline()
    wanted = [request("a" * 200, max_tokens=200) for _ in range(2)]
    answers = await asyncio.gather(*(run(engine, one) for one in wanted))
    tokens = [end_of(answer).usage.completion_tokens for answer in answers]
    await engine.close()
    lock.close()
    print(json.dumps({"tokens": tokens, "spans": spans}), flush=True)

asyncio.run(main())
"""


class Worker:
    """One engine process."""

    def __init__(self, lock: Path, format_name: str, model: Path | None, mode: str = "run") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(lock), format_name, str(model or ""), mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert self.hear() == "ready"

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def test_steps_of_two_formats_never_overlap(tmp_path: Path) -> None:
    lock = tmp_path / "turns"
    model = llama_gguf(tmp_path / "tiny-F32.gguf")
    workers = [Worker(lock, "gguf", model), Worker(lock, "echo", None)]
    try:
        for worker in workers:
            worker.go()
        results = [json.loads(worker.hear()) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert all(tokens for result in results for tokens in result["tokens"])
    spans = sorted(tuple(span) for result in results for span in result["spans"])
    assert len(spans) > 50
    for (_, ended), (began, _) in pairwise(spans):
        assert ended <= began


def test_a_killed_holder_frees_the_turn(tmp_path: Path) -> None:
    lock = tmp_path / "turns"
    holder = Worker(lock, "echo", None, "hold")
    worker = Worker(lock, "gguf", llama_gguf(tmp_path / "tiny-F32.gguf"))
    try:
        holder.go()
        assert holder.hear() == "holding"
        worker.go()
        holder.process.send_signal(signal.SIGKILL)
        assert all(json.loads(worker.hear())["tokens"])
    finally:
        holder.kill()
        worker.kill()


def registered(home: Path) -> int:
    """Return the processes in the turn file; see `backends.engine.accelerator_lock`."""
    path = turn_file(home)
    if not path.exists():
        return 0
    count: int = struct.unpack_from("Q", path.read_bytes(), 16)[0]
    return count


def test_a_servers_engines_share_the_turn(server: Server) -> None:
    url = f"{server.url}/v1/chat/completions"

    def ask(model: str, tokens: int) -> Callable[[], None]:
        body = {"model": model, "messages": [{"role": "user", "content": "b" * 300}]}

        def work() -> None:
            answer = httpx.post(url, json={**body, "max_tokens": tokens}, timeout=120)
            statuses.append(answer.status_code)

        return work

    statuses: list[int] = []
    threads = [threading.Thread(target=ask(STARTER, 60)), threading.Thread(target=ask("echo", 200))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(150)
    assert statuses == [200, 200]
    assert registered(server.home) >= 2


def test_a_killed_format_leaves_the_others_alone(server: Server) -> None:
    url = f"{server.url}/v1/chat/completions"
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    for model in (STARTER, "echo"):
        assert httpx.post(url, json={**body, "model": model}, timeout=60).status_code == 200
    # Whoever holds the turn then, or waits for it, loses its place with its process.
    subprocess.run(["kill", "-9", str(server.pid_of("gguf"))], check=True)
    assert httpx.post(url, json={**body, "model": "echo"}, timeout=60).status_code == 200
    assert httpx.post(url, json={**body, "model": STARTER}, timeout=60).status_code == 200
    wait_until(lambda: registered(server.home) >= 2, "both processes are registered")
