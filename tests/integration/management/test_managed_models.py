"""A user's own model: found by events, named by an alias, given defaults, deleted and restored."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.integration.server import Server, endless_stream, wait_until
from tests.starter import starter_path

MINE = "mine@gguf-q4_1"


@pytest.fixture
def file(server: Server) -> Iterator[Path]:
    """A copy of the starter in a model folder, once it is listed."""
    path = server.models / "mine-Q4_1.gguf"
    part = path.with_suffix(".part")
    shutil.copy(starter_path(), part)
    part.rename(path)
    wait_until(lambda: MINE in listed(server), "the new file is found")
    yield path
    path.unlink(missing_ok=True)


def listed(server: Server) -> list[str]:
    models = httpx.get(f"{server.url}/v1/models", timeout=30).json()["data"]
    return [model["id"] for model in models]


def ask(server: Server, method: str, path: str, body: object = None) -> httpx.Response:
    url = f"{server.url}{path}"
    return httpx.request(method, url, json=body or {}, headers=server.managing, timeout=90)


def chat(server: Server, model: str) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    return ask(server, "POST", "/v1/chat/completions", body)


def test_a_model_is_managed_from_its_file_to_the_bin_and_back(server: Server, file: Path) -> None:
    assert ask(server, "PUT", "/api/aliases/coder", {"model": MINE}).status_code == 200
    assert "coder" in listed(server)
    plain = chat(server, "coder")
    assert plain.json()["model"] == MINE, plain.text

    changes = {"system_prompt": "Answer in rhymes, always.", "sampling": {"temperature": 0}}
    assert ask(server, "PATCH", "/api/models/coder", changes).status_code == 200
    prompted = chat(server, "coder").json()["usage"]["prompt_tokens"]
    assert prompted != plain.json()["usage"]["prompt_tokens"]
    shown = ask(server, "GET", f"/api/models/{MINE}").json()
    assert any(model.startswith("smollm2") for model in shown["duplicates"])

    with endless_stream(server, "coder", "Count."):
        busy = ask(server, "DELETE", "/api/models/coder")
        assert (busy.status_code, busy.json()["error"]["code"]) == (409, "model_in_use")
        assert file.exists()
    wait_until(
        lambda: ask(server, "DELETE", f"/api/models/{MINE}").status_code in (200, 404),
        "the model is deleted when the request has ended",
    )
    assert not file.exists()
    assert not {MINE, "coder"} & set(listed(server))
    (entry,) = ask(server, "GET", "/api/bin").json()["models"]
    assert (entry["model"], entry["freed_bytes"]) == (MINE, starter_path().stat().st_size)

    assert ask(server, "POST", f"/api/bin/{entry['id']}/restore").status_code == 200
    assert file.exists()
    assert chat(server, "coder").json()["usage"]["prompt_tokens"] == prompted
    assert ask(server, "DELETE", "/api/aliases/coder").status_code == 204
