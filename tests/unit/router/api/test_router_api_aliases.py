"""`/api/aliases` over a real catalog: making, moving and deleting the names of users."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.live_server import error_of
from tests.unit.router.api.test_router_api_catalog import TINY, Server, filled_server

OTHER = "other@gguf-q4_0"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    yield from filled_server(tmp_path)


async def _answered_by(server: Server, name: str) -> str:
    body = {"model": name, "messages": [{"role": "user", "content": "Hi"}]}
    answer = await server.ask("POST", "/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["model"])


async def test_alias_is_made_moved_and_deleted_at_run_time(server: Server) -> None:
    made = await server.ask("PUT", "/api/aliases/team/coder", {"model": "mine"})
    assert (made.status_code, made.json()) == (200, {"alias": "team/coder", "model": TINY})
    assert await _answered_by(server, "team/coder") == TINY
    assert await _answered_by(server, "Team/CODER") == TINY

    moved = await server.ask("PUT", "/api/aliases/team/coder", {"model": "other"})
    assert moved.json()["model"] == OTHER
    assert await _answered_by(server, "team/coder") == OTHER
    listed = (await server.ask("GET", "/api/aliases")).json()["aliases"]
    assert listed == [{"alias": "mine", "model": TINY}, {"alias": "team/coder", "model": OTHER}]

    assert (await server.ask("DELETE", "/api/aliases/team/coder")).status_code == 204
    body = {"model": "team/coder", "messages": [{"role": "user", "content": "Hi"}]}
    gone = await server.ask("POST", "/v1/chat/completions", body)
    assert (gone.status_code, error_of(gone)["code"]) == (404, "model_not_found")
    assert await _answered_by(server, "other") == OTHER


async def test_list_has_an_entry_for_each_alias_that_is_not_the_bare_name(server: Server) -> None:
    await server.ask("PUT", "/api/aliases/other", {"model": OTHER})
    entries = (await server.ask("GET", "/v1/models")).json()["data"]
    by_id = {entry["id"]: entry for entry in entries}
    assert {TINY, "mine", OTHER} <= by_id.keys()
    assert "other" not in by_id
    assert (by_id["mine"]["alias_of"], by_id["mine"]["aliases"]) == (TINY, [])
    assert "alias_of" not in by_id[TINY]
    same = {key: value for key, value in by_id[TINY].items() if key not in ("id", "aliases")}
    assert same.items() <= by_id["mine"].items()
    ids = [entry["id"] for entry in (await server.ask("GET", "/api/models")).json()["models"]]
    assert "mine" not in ids


@pytest.mark.parametrize(
    ("alias", "body", "code"),
    [
        ("coder", {"model": "nobody"}, "model_not_found"),
        ("coder", {"model": ""}, "invalid_request"),
        ("coder", {}, "invalid_request"),
        ("coder", {"model": "mine", "more": 1}, "invalid_request"),
        ("a%20b", {"model": "mine"}, "invalid_request"),
        ("%2e%2e%2fx", {"model": "mine"}, "invalid_request"),
        ("tiny@gguf", {"model": "mine"}, "invalid_request"),
        ("x" * 101, {"model": "mine"}, "invalid_request"),
        ("x'; DROP TABLE models; --", {"model": "mine"}, "invalid_request"),
    ],
)
async def test_s7_bad_alias_is_refused(server: Server, alias: str, body: Any, code: str) -> None:
    answer = await server.ask("PUT", f"/api/aliases/{alias}", body)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["code"] == code
    assert (await server.ask("GET", "/api/aliases")).json()["aliases"] == [
        {"alias": "mine", "model": TINY}
    ]


async def test_unknown_alias_is_404(server: Server) -> None:
    answer = await server.ask("DELETE", "/api/aliases/none")
    assert (answer.status_code, error_of(answer)["code"]) == (404, "not_found")
