"""One request, one load or one idle death ends a process: nothing else is hurt, and it is known."""

import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.integration.faults import fragile
from tests.integration.server import HTTP, ROOT, Server, endless_stream, wait_until
from tests.starter import starter_path

ids = {name: f"{name}@{fragile.FORMAT}" for name in fragile.MODELS}
# About five seconds, and more where the process is replaced meanwhile.
LONG = "All streams go on. " * 25


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server in whose environment the fragile format is an installed plug-in."""
    plugins = tmp_path_factory.mktemp("plugins")
    fragile.write_distribution(plugins)
    server = Server(tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("models"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(plugins), str(ROOT)]))
        try:
            server.start(
                FORMATS=f"{fragile.FORMAT},echo",
                STARTERS="false",
                STEP_LIMIT_S="5",
                LOAD_LIMIT_S="5",
                DRAIN_LIMIT_S="1",
            )
            yield server
            assert server.stop() == 0
            assert server.survivors() == []
        finally:
            server.kill()


def ask(server: Server, model: str, text: str) -> httpx.Response:
    messages = [{"role": "user", "content": text}]
    body = {"model": ids[model], "messages": messages}
    return HTTP.post(f"{server.url}/v1/chat/completions", json=body, timeout=180)


def answer_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def states(server: Server) -> dict[str, str]:
    models = HTTP.get(f"{server.url}/api/models", timeout=30).json()["models"]
    return {model["id"]: model["state"] for model in models}


def pid_of(server: Server) -> int:
    return server.pid_of(fragile.FORMAT)


def reset(server: Server) -> None:
    """An explicit load forgets earlier deaths."""
    for name in ("fragile", "innocent"):
        path = f"{server.url}/api/models/{ids[name]}/load"
        assert HTTP.post(path, json={}, headers=server.managing, timeout=120).status_code == 200


@pytest.mark.parametrize("word", [fragile.KILL_PREPARE, fragile.KILL_PREFILL])
def test_a_killer_request_ends_two_processes_and_bystanders_stream_on(
    shared: Server, word: str
) -> None:
    reset(shared)
    with ThreadPoolExecutor(4) as pool:
        bystanders = [pool.submit(ask, shared, name, LONG) for name in ("fragile", "innocent")]
        wait_until(lambda: _running(shared) == 2, "both stream")
        before = pid_of(shared)
        killed = ask(shared, "fragile", f"please {word} now")
        assert killed.status_code == 500
        assert killed.json()["error"]["code"] == "request_crashed_engine"
        assert killed.headers["x-should-retry"] == "false"
        assert "retry-after" not in killed.headers
        assert [answer_of(each.result()) for each in bystanders] == [LONG, LONG]
    assert pid_of(shared) != before
    # Two deaths quarantine nothing, and the innocent model is charged with none.
    assert answer_of(ask(shared, "fragile", "hello")) == "hello"
    assert answer_of(ask(shared, "innocent", "hello")) == "hello"
    # A client that sends it again hurts nobody.
    before = pid_of(shared)
    assert ask(shared, "fragile", f"please {word} now").status_code == 500
    assert pid_of(shared) == before
    # A third death quarantines the model whose requests kill.
    assert ask(shared, "fragile", f"please {word} again").status_code == 503
    assert answer_of(ask(shared, "innocent", "hello")) == "hello"
    assert states(shared)[ids["fragile"]] == "quarantined"
    assert states(shared)[ids["innocent"]] != "quarantined"


def _running(server: Server) -> int:
    names = (server.metric("impetus_engine_running_sequences", model=ids[name]) for name in ids)
    return int(sum(value or 0 for value in names))


def test_a_kill_from_outside_charges_the_model_that_decoded_and_its_stream_goes_on(
    shared: Server,
) -> None:
    reset(shared)
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(ask, shared, "innocent", LONG)
        wait_until(lambda: _running(shared) == 1, "it streams")
        os.kill(pid_of(shared), signal.SIGKILL)
        assert answer_of(stream.result()) == LONG
    assert states(shared)[ids["innocent"]] == "resident"


def test_a_process_that_dies_idle_is_forgotten_without_a_request(shared: Server) -> None:
    reset(shared)
    assert states(shared)[ids["innocent"]] == "resident"
    os.kill(pid_of(shared), signal.SIGKILL)
    wait_until(lambda: "resident" not in states(shared).values(), "nothing is believed", 60)
    assert answer_of(ask(shared, "innocent", "hello")) == "hello"
    assert states(shared)[ids["innocent"]] == "resident"


def test_a_load_that_ends_its_process_charges_the_loaded_model_only(shared: Server) -> None:
    reset(shared)
    with ThreadPoolExecutor(1) as pool:
        bystander = pool.submit(ask, shared, "innocent", LONG)
        wait_until(lambda: _running(shared) == 1, "it streams")
        refused = ask(shared, "unloadable", "hello")
        assert refused.status_code == 503
        assert "died twice while it loaded" in refused.text
        assert answer_of(bystander.result()) == LONG

    def is_quarantined() -> bool:
        ask(shared, "unloadable", "hello")
        return states(shared)[ids["unloadable"]] == "quarantined"

    wait_until(is_quarantined, "a third death puts it into quarantine", 60)
    assert "processes died" in _reason(shared, "unloadable")
    assert states(shared)[ids["innocent"]] != "quarantined"
    assert answer_of(ask(shared, "fragile", "hello")) == "hello"


def _reason(server: Server, model: str) -> str:
    found: dict[str, Any] = HTTP.get(f"{server.url}/v1/models/{ids[model]}", timeout=30).json()
    return str(found["reason"])


def test_a_load_that_hangs_is_ended_and_other_models_are_loaded(shared: Server) -> None:
    reset(shared)
    with ThreadPoolExecutor(2) as pool:
        bystander = pool.submit(ask, shared, "innocent", LONG)
        wait_until(lambda: _running(shared) == 1, "it streams")
        hanging = pool.submit(ask, shared, "hanging", "hello")
        wait_until(lambda: states(shared)[ids["hanging"]] == "loading", "it is being loaded")
        assert answer_of(bystander.result()) == LONG
        refused = hanging.result()
        assert refused.status_code == 503
    assert answer_of(ask(shared, "innocent", "hello")) == "hello"


def test_a_file_truncated_under_its_engine_ends_only_its_own_requests(
    other_server: Server,
) -> None:
    """Its pages are gone, so the next step faults in native code."""
    paths = [other_server.models / f"{name}-q4_1.gguf" for name in ("doomed", "whole")]
    for path in paths:
        shutil.copyfile(starter_path(), path)
    size = paths[0].stat().st_size
    other_server.start(FORMATS="gguf,echo", MAX_SEQUENCES="2", CONTEXT_LENGTH="1024")
    try:
        with (
            endless_stream(other_server, "doomed", "Tell me about ships.") as doomed,
            endless_stream(other_server, "whole", "Tell me about ships.") as whole,
        ):
            os.truncate(paths[0], size // 2)
            end = next((line for line in doomed if '"error"' in line), "")
            assert "broken_model" in end
            assert "it was truncated from" in end
            assert f"({size:,} bytes)" in end
            # The other stream goes on in the next process.
            for _ in range(20):
                assert '"error"' not in next(whole)
        url = f"{other_server.url}/v1/chat/completions"
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        refused = HTTP.post(url, json={**body, "model": "doomed@gguf-q4_1"}, timeout=60)
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "broken_model")
        assert HTTP.post(url, json={**body, "model": "whole"}, timeout=60).status_code == 200
        models = HTTP.get(f"{other_server.url}/api/models", timeout=30).json()["models"]
        found = {model["id"]: model["state"] for model in models}
        assert (found["doomed@gguf-q4_1"], found["whole@gguf-q4_1"]) == ("refused", "resident")
    finally:
        other_server.stop()
