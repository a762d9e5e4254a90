"""Large bodies and web pages against a running server, through all of its processes."""

import json
from typing import Any

import httpx
import pytest

from core.keys import MANAGEMENT_TOKEN, read_key
from core.units import MIB
from tests.integration.server import HTTP, STARTER, Server

ECHO = "echo@echo"


def post(server: Server, path: str, body: Any, **headers: str) -> httpx.Response:
    content = json.dumps(body).encode()
    own = {"content-type": "application/json", **headers}
    return HTTP.post(f"{server.url}{path}", content=content, headers=own, timeout=120)


@pytest.mark.parametrize("size", [5 * MIB, 15 * MIB])
@pytest.mark.parametrize("model", [ECHO, STARTER])
def test_a_body_over_4_mib_reaches_the_engine(server: Server, model: str, size: int) -> None:
    body = {"model": model, "prompt": "word " * (size // 5), "max_tokens": 1}
    refused = post(server, "/v1/completions", body)
    assert refused.status_code in (400, 413), refused.text[:500]
    # The engine itself says that it does not fit.
    assert "context" in refused.text or "limit" in refused.text


def test_token_ids_of_several_mib_reach_the_engine(server: Server) -> None:
    body = {"model": ECHO, "prompt": [[2**30] * 200_000] * 4, "max_tokens": 1}
    refused = post(server, "/v1/completions", body)
    assert refused.status_code == 400, refused.text[:500]


def test_the_largest_batch_of_embeddings_is_answered(server: Server) -> None:
    body = {"model": "all-minilm-l6-v2", "input": ["a"] * 2048, "encoding_format": "base64"}
    answer = post(server, "/v1/embeddings", body)
    assert answer.status_code == 200, answer.text[:500]
    assert len(answer.json()["data"]) == 2048


def test_a_body_over_the_limit_is_413(server: Server) -> None:
    refused = post(server, "/v1/completions", {"model": ECHO, "prompt": "x" * 17 * MIB})
    assert refused.status_code == 413
    assert "16.0 MiB" in refused.text


def test_pages_need_the_token_to_manage(server: Server) -> None:
    path = f"/api/models/{ECHO}/load"
    for origin in ("file://", "vscode-webview://abc", "http://localhost:5173"):
        refused = post(server, path, {}, origin=origin)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "permission_denied")
        assert post(server, "/api/drain", {}, origin=origin).status_code == 403
    token = read_key(server.home, MANAGEMENT_TOKEN)
    loaded = post(server, path, {}, origin="file://", **{"x-impetus-token": token})
    assert loaded.status_code == 200, loaded.text
    assert HTTP.get(f"{server.url}/readyz").status_code == 200
