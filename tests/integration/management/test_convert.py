"""A conversion that a user starts: it outlives all of its processes, and its result answers."""

import contextlib
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.integration.management.test_downloads import get, process_of_jobs
from tests.integration.server import HTTP, Server, wait_until
from tests.integration.test_formats import NAME, QUESTION, place

MODEL = f"{NAME}@safetensors-f32"
SETTINGS = {
    "STARTERS": "false",
    "MEMORY_BUDGET": "600MiB",
    "CONTEXT_LENGTH": "256",
    "FORMATS": "gguf,safetensors",
    "MAX_SEQUENCES": "2",
    "SCAN_INTERVAL_S": "600",
}
RESULT = f"{NAME}@gguf-q8_0"
BODY = {"model": MODEL, "format": "gguf", "quantization": "q8_0"}


def chat(server: Server, model: str) -> httpx.Response:
    body = {"model": model, "messages": QUESTION, "max_tokens": 4, "temperature": 0}
    return HTTP.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)


def refusal(server: Server) -> Any:
    """Return the error of a chat with the model that does not fit, once it was found."""
    found: list[Any] = []

    def is_known() -> bool:
        answer = chat(server, MODEL)
        found.append(answer.json()["error"])
        # On a busy machine the scan that finds the folder takes longer than a request waits.
        return answer.status_code != 503

    wait_until(is_known, "the model is known", 120)
    return found[-1]


def begin(server: Server) -> Any:
    begun = HTTP.post(f"{server.url}/api/convert", json=BODY, headers=server.managing, timeout=60)
    assert begun.status_code == 202, begun.text
    return begun.json()


def choices(server: Server) -> tuple[Any, Any]:
    """Return what the model can be converted to, and what of that is GGUF."""
    found = get(server, f"/api/convert/choices?model={MODEL}")
    (gguf,) = [target for target in found["targets"] if target["format"] == "gguf"]
    return found, gguf


def converting(server: Server) -> psutil.Process:
    """Return the process that converts, once there is one."""
    found: list[psutil.Process] = []

    def is_there() -> bool:
        assert server.process is not None
        for process in psutil.Process(server.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "catalog.convert.child" in process.cmdline():
                    found.append(process)
        return bool(found)

    wait_until(is_there, "a process converts", 120)
    return found[-1]


def end_of(process: psutil.Process) -> None:
    wait_until(lambda: not process.is_running(), f"{process.pid} has ended")


def interrupt(server: Server) -> None:
    """Kill the process that converts; that of the jobs, which takes it along; the server."""
    first = converting(server)
    first.kill()
    end_of(first)
    second = converting(server)
    process_of_jobs(server).kill()
    end_of(second)
    third = converting(server)
    assert server.process is not None
    # The process of the jobs is a new one, and goes on for seconds without the others.
    server.tree = psutil.Process(server.process.pid).children(recursive=True)
    server.kill()
    end_of(third)
    server.start(**SETTINGS)
    converting(server)


def test_conversion_outlives_its_processes_and_its_result_answers(other_server: Server) -> None:
    server = other_server
    place("hf-f32", server.models)
    server.start(**SETTINGS)
    error = refusal(server)
    assert (error["code"], error["param"]) == ("conversion_needed", "model")
    assert "It can be converted to gguf q8_0" in error["message"]
    assert get(server, "/api/jobs")["jobs"] == []
    found, gguf = choices(server)
    assert (gguf["reason"], gguf["runs_here"]) == ("", True)
    forecasts = {choice["quantization"]: choice["forecast"] for choice in gguf["choices"]}
    assert not forecasts["q8_0"]["is_measured"]
    assert found["free_bytes"] > forecasts["q8_0"]["disk_bytes"]

    job = begin(server)
    path, folder = f"/api/jobs/{job['id']}", Path(job["folder"])
    wait_until(lambda: get(server, path)["done_bytes"] > 0, "it converts", 120)
    assert begin(server)["id"] == job["id"]
    waiting = chat(server, MODEL)
    assert waiting.status_code == 503
    assert "is being converted to gguf q8_0" in waiting.json()["error"]["message"]
    interrupt(server)
    assert not folder.exists()

    wait_until(lambda: get(server, path)["state"] == "done", "it is done", 240)
    # Nothing is left of the first attempts.
    assert [made.name for made in folder.parent.iterdir()] == [folder.name]
    done = get(server, path)
    assert done["model_ids"] == [RESULT]
    record = get(server, f"/api/models/{RESULT}")
    assert record["conversion"] == done["conversion"]
    assert record["conversion"]["source"] == MODEL
    quality = record["conversion"]["quality"]
    # The source needs more than the budget, so that only the result's perplexity is known.
    assert quality["reason"]
    assert quality["perplexity_result"] > 1
    for name in (RESULT, MODEL):
        answer = chat(server, name)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == RESULT
        assert answer.json()["choices"][0]["message"]["content"]
    found, gguf = choices(server)
    assert found["used_bytes"] > 100_000_000
    assert gguf["choices"][0]["forecast"]["is_measured"]
    assert server.stop() == 0
    assert server.survivors() == []
