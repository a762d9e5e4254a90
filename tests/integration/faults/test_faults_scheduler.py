"""Memory, queues, heat, hangs and crash loops on a real server with room for two of three models.

The ids are those of the reliability list, group F.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.gguf_files import llama_gguf
from tests.integration.conftest import Servers
from tests.integration.server import HTTP, Server, endless_stream, wait_until
from tests.starter import starter_path

NAMES = ("alpha", "beta", "gamma")
IDS = {name: f"{name}@gguf-q4_1" for name in NAMES}
TRACE = ("alpha", "beta", "alpha", "alpha", "gamma", "alpha", "beta", "gamma")
ENDLESS = {"logit_bias": {"2": -100, "0": -100}, "max_tokens": 4000, "stream": True}
# Waiting requests that one model's engine takes.
QUEUE = 16
SOAK_S = float(os.environ.get("IMPETUS_SOAK_S", "45"))


@pytest.fixture(scope="module")
def thermal_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that sets the server's temperature."""
    path = tmp_path_factory.mktemp("sensors") / "thermal"
    path.write_text("nominal")
    return path


@pytest.fixture
def small(servers: Servers, thermal_file: Path) -> Server:
    """A server whose budget holds two of the three models."""

    def prepare(server: Server) -> None:
        for name in NAMES:
            shutil.copyfile(starter_path(), server.models / f"{name}-q4_1.gguf")

    return servers.get(
        prepare=prepare,
        MEMORY_BUDGET="800MiB",
        CONTEXT_LENGTH="2048",
        MAX_SEQUENCES="2",
        MAX_WAITING=str(QUEUE),
        THERMAL_FILE=str(thermal_file),
        FORMATS="gguf,echo",
        DRAIN_LIMIT_S="1",
    )


def body(model: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Tell me about the sea."}]
    return {"model": model, "messages": messages, "max_tokens": 4, **fields}


def ask(server: Server, model: str, **fields: Any) -> httpx.Response:
    url = f"{server.url}/v1/chat/completions"
    return HTTP.post(url, json=body(model, **fields), timeout=120)


def error(answer: httpx.Response) -> dict[str, Any]:
    found: dict[str, Any] = answer.json()["error"]
    return found


def states(server: Server) -> dict[str, str]:
    models = HTTP.get(f"{server.url}/api/models", timeout=30).json()["models"]
    return {model["name"]: model["state"] for model in models}


def reason(server: Server, model: str) -> str:
    answer = HTTP.get(f"{server.url}/v1/models/{IDS[model]}", timeout=30)
    return str(answer.json()["reason"])


def decisions(server: Server) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = HTTP.get(f"{server.url}/api/decisions", timeout=30).json()[
        "decisions"
    ]
    return found


def loads_of(server: Server) -> int:
    return sum(one["action"].startswith("load ") for one in decisions(server))


async def play(server: Server, trace: tuple[str, ...], *, at_once: bool) -> tuple[float, int]:
    """Run the trace; return the mean latency in seconds and how many models were resident at most.

    `at_once`: as agents do, each asking without regard for the others; else one after another.
    """
    most = 0
    started = time.monotonic()
    latencies: list[float] = []
    is_over = asyncio.Event()
    async with httpx.AsyncClient(timeout=300) as client:

        async def one(name: str) -> None:
            answer = await client.post(f"{server.url}/v1/chat/completions", json=body(name))
            assert answer.status_code == 200, answer.text
            latencies.append(time.monotonic() - started)

        async def watch() -> None:
            nonlocal most
            while not is_over.is_set():
                models = (await client.get(f"{server.url}/v1/models")).json()["data"]
                ours = [m["state"] for m in models if m["name"] in NAMES]
                most = max(most, sum(state in ("resident", "loading") for state in ours))
                await asyncio.sleep(0.05)

        watcher = asyncio.ensure_future(watch())
        if at_once:
            await asyncio.gather(*(one(name) for name in trace))
        else:
            for name in trace:
                await one(name)
        is_over.set()
        await watcher
    return sum(latencies) / len(latencies), most


async def test_f7_three_models_with_room_for_two_serve_the_agents_trace(
    small: Server, record_property: Any
) -> None:
    before = loads_of(small)
    in_turn, most_in_turn = await play(small, TRACE * 3, at_once=False)
    after = loads_of(small)
    grouped, most = await play(small, TRACE * 3, at_once=True)
    loads_in_turn, loads = after - before, loads_of(small) - after
    record_property("mean_latency_s", {"first_in_first_out": in_turn, "scheduled": grouped})
    record_property("loads", {"first_in_first_out": loads_in_turn, "scheduled": loads})
    assert max(most, most_in_turn) <= 2
    assert loads < loads_in_turn


def test_f7_memory_came_back_after_every_unload(small: Server) -> None:
    ask(small, "alpha")
    HTTP.post(
        f"{small.url}/api/models/{IDS['alpha']}/unload", json={}, headers=small.managing, timeout=60
    )
    freed = [one for one in decisions(small) if one["action"] == f"freed {IDS['alpha']}"]
    assert freed
    assert "came back" in freed[0]["reason"]


async def test_f9_exactly_the_surplus_is_refused_and_the_rest_is_served(small: Server) -> None:
    """Two endless streams hold both slots; of 200 more requests as many wait as the queue holds."""
    assert ask(small, "alpha").status_code == 200
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:
        url = f"{small.url}/v1/chat/completions"
        holders = [
            client.build_request("POST", url, json=body("alpha", **ENDLESS)) for _ in range(2)
        ]
        streams = [await client.send(one, stream=True) for one in holders]
        # An iterator that is dropped closes its connection.
        held = [stream.aiter_lines() for stream in streams]
        for lines in held:
            await anext(lines)
        asked = [asyncio.ensure_future(client.post(url, json=body("alpha"))) for _ in range(200)]
        refused = 0
        while refused < 200 - QUEUE:
            done, _ = await asyncio.wait(
                [one for one in asked if not one.done()], return_when=asyncio.FIRST_COMPLETED
            )
            refused += len(done)
            assert {one.result().status_code for one in done} == {429}
        for stream in streams:
            await stream.aclose()
        answers = await asyncio.gather(*asked)
    codes = [answer.status_code for answer in answers]
    assert (codes.count(200), codes.count(429)) == (QUEUE, 200 - QUEUE)
    assert all(int(a.headers["retry-after"]) > 0 for a in answers if a.status_code == 429)


async def test_f17_health_and_metrics_answer_under_load_and_wake_nothing(small: Server) -> None:
    for name in NAMES:
        HTTP.post(
            f"{small.url}/api/models/{IDS[name]}/unload",
            json={},
            headers=small.managing,
            timeout=60,
        )
    async with httpx.AsyncClient(timeout=10) as client:
        for path in ("/healthz", "/readyz", "/metrics", "/v1/models"):
            assert (await client.get(f"{small.url}{path}")).status_code == 200
        assert "resident" not in {states(small)[name] for name in NAMES}
        url = f"{small.url}/v1/chat/completions"
        async with client.stream("POST", url, json=body("alpha", **ENDLESS)) as stream:
            lines = stream.aiter_lines()
            await anext(lines)
            for path in ("/healthz", "/readyz", "/metrics"):
                assert (await client.get(f"{small.url}{path}")).status_code == 200


def test_f16_a_keep_alive_of_nothing_loses_no_request(small: Server) -> None:
    path = f"{small.url}/api/models/{IDS['beta']}"
    assert (
        HTTP.patch(path, json={"keep_alive_s": 0}, headers=small.managing, timeout=30).status_code
        == 200
    )
    try:
        answers = [ask(small, "beta") for _ in range(20)]
        assert [answer.status_code for answer in answers] == [200] * 20
        wait_until(lambda: states(small)["beta"] == "available", "the model is unloaded")
    finally:
        HTTP.patch(path, json={"keep_alive_s": None}, headers=small.managing, timeout=30)


def test_f5_what_can_never_fit_beside_a_pinned_model_is_refused_with_the_numbers(
    small: Server,
) -> None:
    for name in ("alpha", "beta"):
        path = f"{small.url}/api/models/{IDS[name]}"
        assert (
            HTTP.patch(path, json={"pin": True}, headers=small.managing, timeout=30).status_code
            == 200
        )
        assert ask(small, name).status_code == 200
    try:
        refused = ask(small, "gamma")
        assert (refused.status_code, error(refused)["code"]) == (503, "insufficient_memory")
        assert "800.0 MiB" in error(refused)["message"]
        assert {states(small)[name] for name in ("alpha", "beta")} == {"resident"}
    finally:
        for name in ("alpha", "beta"):
            path = f"{small.url}/api/models/{IDS[name]}"
            HTTP.patch(path, json={"pin": None}, headers=small.managing, timeout=30)


def test_kv_types_are_a_setting_of_the_model(small: Server) -> None:
    path = f"{small.url}/api/models/{IDS['gamma']}"
    assert (
        HTTP.patch(path, json={"kv_type": "q8_0"}, headers=small.managing, timeout=30).status_code
        == 200
    )
    try:
        assert ask(small, "gamma").status_code == 200
    finally:
        HTTP.patch(path, json={"kv_type": None}, headers=small.managing, timeout=30)
        HTTP.post(f"{path}/unload", json={}, headers=small.managing, timeout=60)
    refused = HTTP.patch(path, json={"kv_type": "q3_k"}, headers=small.managing, timeout=30)
    assert (refused.status_code, error(refused)["param"]) == (400, "kv_type")
    echo = HTTP.patch(
        f"{small.url}/api/models/echo@echo",
        json={"kv_type": "f16"},
        headers=small.managing,
        timeout=30,
    )
    assert (echo.status_code, error(echo)["param"]) == (400, "kv_type")


def test_f12_a_model_that_cannot_be_loaded_is_not_tried_for_every_request(small: Server) -> None:
    path = llama_gguf(small.models / "wrong-F32.gguf")
    # The table promises one layer more than there are tensors for.
    content = bytearray(path.read_bytes())
    key = b"llama.block_count"
    at = content.index(key) + len(key) + 4
    content[at : at + 4] = (int.from_bytes(content[at : at + 4], "little") + 1).to_bytes(
        4, "little"
    )
    path.write_bytes(content)
    first = ask(small, "wrong")
    assert first.status_code in (422, 503)
    again = ask(small, "wrong")
    if error(first)["code"] == "broken_model" and error(again)["code"] == "broken_model":
        # Inspection itself refused it; then nothing is ever loaded.
        assert states(small)["wrong"] == "refused"
    else:
        assert (again.status_code, error(again)["code"]) == (503, "model_failed")
        assert int(again.headers["retry-after"]) > 0
        assert states(small)["wrong"] == "failed"
    path.unlink()


def test_f11_a_crash_loop_puts_the_model_into_quarantine_until_it_is_loaded_by_hand(
    small: Server,
) -> None:
    url = f"{small.url}/v1/chat/completions"
    for _ in range(3):
        if states(small)["gamma"] == "quarantined":
            break
        with httpx.stream("POST", url, json=body("gamma", **ENDLESS), timeout=120) as stream:
            lines = stream.iter_lines()
            while not next(lines).startswith("data:"):
                pass
            for _ in range(3):
                pid = small.pid_of("gguf")
                os.kill(pid, signal.SIGKILL)
                if not _goes_on(small, lines, pid):
                    break
    refused = ask(small, "gamma")
    assert (refused.status_code, error(refused)["code"]) == (503, "model_quarantined")
    assert states(small)["gamma"] == "quarantined"
    assert "processes died" in reason(small, "gamma")
    assert ask(small, "alpha").status_code == 200
    loaded = HTTP.post(
        f"{small.url}/api/models/{IDS['gamma']}/load", json={}, headers=small.managing, timeout=60
    )
    assert loaded.status_code == 200
    assert ask(small, "gamma").status_code == 200


def _goes_on(server: Server, lines: Iterator[str], old: int) -> bool:
    """Whether the stream has more text from another process than `old`."""
    for line in lines:
        if '"error"' in line or line == "data: [DONE]":
            return False
        now = server.metric("impetus_process_pid", process="gguf")
        if line.startswith("data:") and now is not None and int(now) != old:
            return True
    return False


def test_f2_a_process_that_dies_before_the_first_token_costs_no_answer(small: Server) -> None:
    assert ask(small, "alpha").status_code == 200
    url = f"{small.url}/v1/chat/completions"
    long = [{"role": "user", "content": "word " * 800}]
    with httpx.stream(
        "POST", url, json=body("alpha", stream=True, messages=long), timeout=120
    ) as stream:
        os.kill(small.pid_of("gguf"), signal.SIGKILL)
        text = "".join(stream.iter_lines())
    assert '"error"' not in text
    assert "[DONE]" in text
    HTTP.post(
        f"{small.url}/api/models/{IDS['alpha']}/load", json={}, headers=small.managing, timeout=60
    )


def test_f3_a_process_that_hangs_is_replaced_and_others_answer_meanwhile(small: Server) -> None:
    assert ask(small, "alpha").status_code == 200
    old = small.pid_of("gguf")
    os.kill(old, signal.SIGSTOP)
    url = f"{small.url}/v1/chat/completions"
    with httpx.stream(
        "POST", url, json=body("alpha", stream=True), timeout=httpx.Timeout(150)
    ) as stream:
        assert ask(small, "echo").status_code == 200
        assert HTTP.get(f"{small.url}/healthz", timeout=10).status_code == 200
        text = "".join(stream.iter_lines())
    assert "[DONE]" in text
    assert '"error"' not in text
    wait_until(lambda: _has_ended(old), "the hung process is ended")
    assert small.pid_of("gguf") != old


def test_f15_heat_unloads_refuses_and_goes_away_again(small: Server, thermal_file: Path) -> None:
    assert ask(small, "alpha").status_code == 200
    thermal_file.write_text("critical")
    wait_until(lambda: "resident" not in states(small).values(), "idle models are unloaded")
    refused = ask(small, "alpha")
    assert (refused.status_code, error(refused)["code"]) == (503, "unavailable")
    assert int(refused.headers["retry-after"]) > 0
    thermal_file.write_text("nominal")
    wait_until(lambda: ask(small, "alpha").status_code == 200, "it is served again", 90.0)
    assert "pause jobs" in [one["action"] for one in decisions(small)]
    wait_until(
        lambda: "let jobs go on" in [one["action"] for one in decisions(small)],
        "jobs go on",
    )


def _has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_f4_a_router_that_dies_comes_back_and_leaves_no_second_one(small: Server) -> None:
    old = small.pid_of("router")
    os.kill(old, signal.SIGKILL)
    wait_until(lambda: _is_up(small), "the router listens again", 60.0)
    assert small.pid_of("router") != old
    assert ask(small, "alpha").status_code == 200
    assert _count(small, "router") == 1


def test_f4_a_scheduler_that_dies_knows_again_what_is_resident(small: Server) -> None:
    assert ask(small, "alpha").status_code == 200
    (scheduler,) = _named(small, "scheduler")
    scheduler.kill()
    # A resident model's requests need no scheduler.
    assert ask(small, "alpha").status_code == 200
    wait_until(lambda: bool(_named(small, "scheduler")), "it is replaced")
    wait_until(lambda: _resident(small) == {"alpha"}, "it knows what is resident")


def _resident(server: Server) -> set[str]:
    answer = HTTP.get(f"{server.url}/v1/models", timeout=60)
    if answer.status_code != 200:
        return set()
    return {model["name"] for model in answer.json()["data"] if model["state"] == "resident"}


def _is_up(server: Server) -> bool:
    try:
        return HTTP.get(f"{server.url}/readyz", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


def _named(server: Server, deployment: str) -> list[psutil.Process]:
    assert server.process is not None
    found = []
    for process in psutil.Process(server.process.pid).children(recursive=True):
        try:
            line = " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        if f"ServeReplica:impetus:{deployment}" in line:
            found.append(process)
    return found


def _count(server: Server, deployment: str) -> int:
    return len(_named(server, deployment))


async def test_f18_a_soak_of_cancels_kills_and_loads_leaves_nothing_behind(
    small: Server, tmp_path: Path
) -> None:
    """A minute here; IMPETUS_SOAK_S makes it as long as wanted."""
    del tmp_path
    for name in NAMES:
        # The first prompt of a model starts the process of its chat template.
        assert ask(small, name).status_code == 200
    processes = _working(small)
    router = psutil.Process(small.pid_of("router"))
    before = (router.num_fds(), router.num_threads())
    unexplained: list[str] = []
    end = time.monotonic() + SOAK_S
    async with httpx.AsyncClient(timeout=120) as client:

        async def agent(number: int) -> None:
            turn = 0
            while time.monotonic() < end:
                turn += 1
                name = NAMES[(number * 7 + turn * turn) % 3]
                url = f"{small.url}/v1/chat/completions"
                if turn % 4 == 3:
                    async with client.stream("POST", url, json=body(name, **ENDLESS)) as stream:
                        async for _, line in _numbered(stream):
                            if line.startswith("data:"):
                                break
                    continue
                answer = await client.post(url, json=body(name))
                if answer.status_code >= 500 and "retry-after" not in answer.headers:
                    unexplained.append(answer.text)

        async def kill_once() -> None:
            await asyncio.sleep(SOAK_S / 3)
            os.kill(await asyncio.to_thread(small.pid_of, "gguf"), signal.SIGKILL)

        await asyncio.gather(kill_once(), *(agent(number) for number in range(4)))
    assert unexplained == []
    wait_until(lambda: small.shown("impetus_in_flight_requests") <= 1, "all ended")
    wait_until(lambda: _working(small) <= processes, "no process is left over")
    wait_until(lambda: router.num_fds() <= before[0] + 16, "the router's files are closed")
    wait_until(lambda: router.num_threads() <= before[1] + 8, "the router's threads ended")


async def _numbered(stream: httpx.Response) -> Any:
    number = 0
    async for line in stream.aiter_lines():
        yield number, line
        number += 1


def _working(server: Server) -> int:
    """Return how many processes work for us; Ray keeps idle ones of its own as it likes."""
    assert server.process is not None
    count = 0
    for process in psutil.Process(server.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            command = " ".join(process.cmdline())
            count += "ServeReplica" in command or "template_worker" in command
    return count


def test_f10_a_hangup_during_a_stream_leaves_no_process(small: Server) -> None:
    with endless_stream(small, "alpha", "Write a long story."):
        assert small.stop(signal.SIGHUP) == 0
    assert small.survivors() == []
